"""The processors of boards, as QEMU emulates them and as Linux describes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_CPUINFO = """\
processor\t: {core}
BogoMIPS\t: 38.40
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: {variant}
CPU part\t: {part}
CPU revision\t: {revision}

"""


@dataclass(frozen=True)
class Board:
    """A board with one cluster of equal cores.

    Attributes:
        cpu: QEMU's name of the processor.
        part: Its number, with ``variant`` and ``revision``: what ``/proc/cpuinfo`` says on the board.
        variant: See ``part``.
        revision: See ``part``.
        features: What it can do beyond plain ARMv8.0, in the kernel's words.
        l2_kib: Size of the second-level cache.
        l2_shared: Whether all cores share it.
        cores: How many there are.
    """

    cpu: str
    part: str
    variant: str
    revision: int
    features: str
    l2_kib: int
    l2_shared: bool
    cores: int = 4

    def describe(self, root: Path) -> None:
        """Write what the runtime reads of ``/proc`` and ``/sys`` below ``root``.

        QEMU passes these through to the host. Where a host describes an x86 processor, ONNX Runtime cannot name the
        processor, and 1.31.1 crashes (docs/adr/0008).
        """
        cores, every = range(self.cores), f"0-{self.cores - 1}"
        (root / "proc").mkdir()
        base = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
        features = f"{base} {self.features}".strip()
        fields = {"features": features, "variant": self.variant, "part": self.part, "revision": self.revision}
        (root / "proc/cpuinfo").write_text("".join(_CPUINFO.format(core=core, **fields) for core in cores))
        files = dict.fromkeys(("online", "possible", "present"), every)
        for core in cores:
            files |= {
                f"cpu{core}/topology/physical_package_id": "0",
                f"cpu{core}/topology/core_siblings_list": every,
                f"cpu{core}/topology/cluster_cpus_list": every,
                f"cpu{core}/cache/index2/level": "2",
                f"cpu{core}/cache/index2/size": f"{self.l2_kib}K",
                f"cpu{core}/cache/index2/shared_cpu_list": every if self.l2_shared else str(core),
            }
        for name, content in files.items():
            file = root / "sys/devices/system/cpu" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")


NANO = Board("cortex-a57", part="0xd07", variant="0x1", revision=1, features="", l2_kib=2048, l2_shared=True)
"""Jetson Nano, tier T1: ARMv8.0."""

PI_5 = Board(
    "cortex-a76",
    part="0xd0b",
    variant="0x4",
    revision=1,
    features="atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    l2_kib=512,
    l2_shared=False,
)
"""Raspberry Pi 5, tier T4: ARMv8.2 with dot products and half precision, as the Orins of T2 and T3 have."""
