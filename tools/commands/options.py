"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

IDENTITY = "identity"
"""Folder of an identity, below a state folder."""

if TYPE_CHECKING:
    from fleetune.edge.protocol.address import BrokerAddress
    from fleetune.edge.protocol.identity.credential import Sender
    from fleetune.edge.protocol.identity.folder import Identity


def add_command(
    subparsers: Any, name: str, *, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command whose help ends with examples."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_broker(parser: argparse.ArgumentParser) -> None:
    """``--broker``."""
    parser.add_argument(
        "--broker",
        metavar="URL",
        default="mqtt://127.0.0.1:1883",
        help="MQTT 5 broker, mqtts://host[:port], or mqtt:// without TLS (default: %(default)s)",
    )


def add_identity(parser: argparse.ArgumentParser) -> None:
    """``--identity`` and ``--insecure``."""
    parser.add_argument(
        "--identity",
        metavar="DIR",
        type=Path,
        help="folder with this machine's identity (default: STATE/identity, if it is there)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="go without identity or TLS to a broker on another machine: whoever reaches it can read and forge all",
    )


def add_inventory(parser: argparse.ArgumentParser) -> None:
    """``--inventory``."""
    parser.add_argument("--inventory", metavar="FILE", type=Path, required=True, help="fleet file, docs/fleet-file.md")


def add_images(parser: argparse.ArgumentParser) -> None:
    """``--images``."""
    parser.add_argument(
        "--images", metavar="DIR", type=Path, default=Path("images"), help="where images are (default: %(default)s)"
    )


def add_emulated(parser: argparse.ArgumentParser, out: str) -> None:
    """``--pack``, ``--data``, ``--images``, ``--out`` and ``--json`` of what emulated boards do."""
    parser.add_argument("--pack", metavar="DIR", type=Path, help="of emulated boards (default: a toy: these are slow)")
    parser.add_argument(
        "--data", metavar="FILE", type=Path, help="their samples, of two classes (default: reviews of films)"
    )
    add_images(parser)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(out), help="report, logs, disks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_authority(parser: argparse.ArgumentParser) -> None:
    """``--authority``."""
    parser.add_argument(
        "--authority",
        metavar="DIR",
        type=Path,
        default=Path("authority"),
        help="the authority's folder (default: %(default)s)",
    )


def check_identity(args: argparse.Namespace, sender: Sender, fleet: str) -> tuple[BrokerAddress, Identity | None]:
    """The broker, and who this machine is there.

    Args:
        args: The command line, with ``--broker``, ``--identity``, ``--insecure`` and ``--state``.
        sender: Who it must be.
        fleet: The fleet that it must be of.

    Raises:
        ConfigError: The broker is on another machine, and what is said there would be open to all.
        IdentityError: There is no identity, or it is somebody else's.
    """
    from fleetune.edge.protocol.address import BrokerAddress
    from fleetune.edge.protocol.errors import ConfigError, IdentityError
    from fleetune.edge.protocol.identity.folder import FILE, read_identity

    broker = BrokerAddress.parse(args.broker)
    enrolled: Path = args.state / IDENTITY
    folder = args.identity or (enrolled if (enrolled / FILE).exists() else None)
    identity = None if folder is None else read_identity(folder)
    if identity is not None:
        own = identity.credential
        if (own.fleet, own.sender) != (fleet, sender):
            raise IdentityError(
                f"--identity: {folder} is {own.role} {own.name} of the fleet {own.fleet}, "
                f"not {sender.role} {sender.name} of {fleet}",
                "name the folder of this one",
            )
    if not broker.is_local and not (broker.tls and identity) and not args.insecure:
        lacks = "names no identity" if identity is None else "is without TLS"
        raise ConfigError(
            f"--broker: {broker} is on another machine, and this command {lacks}",
            "make a fleet with `fleetune fleet init`, or accept it with --insecure on a network of your own",
        )
    return broker, identity


def check_pack(args: argparse.Namespace, identity: Identity | None) -> None:
    """See that the pack is signed, where this machine knows by whom it has to be.

    Raises:
        SignatureError: It is not.
    """
    from fleetune.edge.protocol.identity.signature import check_file

    if identity is not None and not args.insecure:
        check_file(args.pack, identity.trust)


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """``--fleet``."""
    parser.add_argument(
        "--fleet", metavar="FILE", type=Path, required=True, help="fleet file: devices, profiles, budgets"
    )


def add_pack(parser: argparse.ArgumentParser) -> None:
    """``--pack``."""
    parser.add_argument("--pack", metavar="DIR", type=Path, required=True, help="pack, as `fleetune pack` wrote it")


def add_state(parser: argparse.ArgumentParser) -> None:
    """``--state``."""
    parser.add_argument(
        "--state", metavar="DIR", type=Path, required=True, help="folder that survives restarts; created if missing"
    )


def add_threads(parser: argparse.ArgumentParser, use: str) -> None:
    """``--threads``, of ONNX Runtime, for some use."""
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help=f"threads for {use}; 0 is one a core (default: %(default)s)",
    )


def add_codec(parser: argparse.ArgumentParser, what: str) -> None:
    """``--codec``, of what travels one way."""
    parser.add_argument(
        "--codec",
        metavar="CODEC",
        default="int4+zlib",  # codec.DEFAULT, without NumPy, which `fleetune doctor` must not need to start
        help=f"how {what} become bytes: f32, f16, int8 or int4, and +zlib to compress them (default: %(default)s)",
    )


def check_codec(name: str) -> None:
    """Check ``--codec``.

    Raises:
        ConfigError: There is none of that name.
    """
    from fleetune.edge.protocol.codec import CODECS
    from fleetune.edge.protocol.errors import ConfigError

    if name not in CODECS:
        raise ConfigError(f"--codec: {name} is unknown", f"choose from {', '.join(CODECS)}")


def check_threads(threads: int) -> None:
    """Check ``--threads``.

    Raises:
        ConfigError: It is negative.
    """
    from fleetune.edge.protocol.errors import ConfigError

    if threads < 0:
        raise ConfigError(f"--threads: {threads} is out of range", "use 1 or more, or 0 for one a core")


def check_state(path: Path) -> None:
    """Check ``--state`` before anything is written.

    Raises:
        ConfigError: It is something else than a folder.
    """
    from fleetune.edge.protocol.errors import ConfigError

    if path.exists() and not path.is_dir():
        raise ConfigError(f"--state: {path} is not a folder", "name a folder; it is made if it is missing")
