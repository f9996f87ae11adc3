"""``fleetune flash mender`` and ``fleetune flash rauc``: a build, as systems with A/B updates take it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command


def register(actions: Any) -> None:
    """Add the actions."""
    _register_mender(actions)
    _register_rauc(actions)


def _register_mender(actions: Any) -> None:
    parser = add_command(
        actions,
        "mender",
        summary="a build as a signed Mender artifact",
        description=(
            "Make a Mender artifact of a build's Debian package, for Mender's update module `deb`, signed and held\n"
            "against the key. The operating system's own A/B update stays what it is. Needs mender-artifact."
        ),
        examples=(
            "  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out mender.pem     once; keep it\n"
            "  fleetune flash mender images/fleetune_0.1.0+t1_arm64.build.json --device-type jetson-nano \\\n"
            "      --key mender.pem\n"
        ),
    )
    _add_build(parser)
    parser.add_argument(
        "--device-type",
        dest="types",
        action="append",
        required=True,
        metavar="TYPE",
        help="boards that take it, as Mender knows them; may be given several times",
    )
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="private key, PEM: P-256 or RSA")
    parser.set_defaults(run=_mender)


def _register_rauc(actions: Any) -> None:
    parser = add_command(
        actions,
        "rauc",
        summary="a build as a signed RAUC bundle",
        description=(
            "Make a RAUC bundle of a build's kit, for a slot `appfs` that the boards mount at\n"
            "/var/lib/fleetune-kits, signed and held against the keyring. Units and launcher are in the boards'\n"
            "root file system already: the overlay. Needs rauc and squashfs-tools."
        ),
        examples=(
            "  fleetune flash rauc images/fleetune_0.1.0+t2_arm64.build.json --compatible acme-orin \\\n"
            "      --key rauc.key.pem --cert rauc.cert.pem --keyring ca.cert.pem\n"
        ),
    )
    _add_build(parser)
    parser.add_argument("--compatible", required=True, metavar="NAME", help="of the boards, as in their system.conf")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="private key, PEM")
    parser.add_argument("--cert", required=True, type=Path, metavar="FILE", help="its certificate, PEM")
    parser.add_argument(
        "--keyring", type=Path, metavar="FILE", help="what the boards hold bundles against, PEM (default: --cert)"
    )
    parser.set_defaults(run=_rauc)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("build", metavar="BUILD", type=Path, help="a build's record, *.build.json")


def _mender(args: argparse.Namespace) -> None:
    from fleetune.tools.flash.mender import write_mender
    from fleetune.tools.flash.record import check_record

    build = check_record(args.build)
    deb = args.build.parent / next(name for name in build.files if name.endswith(".deb"))
    out = deb.with_suffix(".mender")
    name = f"fleetune-{build.fleetune}+{build.tier}-{build.kit}"
    write_mender(deb, out, name=name, device_types=args.types, key=args.key)
    print(out)  # noqa: T201


def _rauc(args: argparse.Namespace) -> None:
    from fleetune.tools.flash.rauc import write_rauc
    from fleetune.tools.flash.record import check_record

    build = check_record(args.build)
    overlay = args.build.parent / next(name for name in build.files if name.endswith(".overlay.tar.gz"))
    out = overlay.with_name(overlay.name.removesuffix(".overlay.tar.gz") + ".raucb")
    write_rauc(
        overlay,
        out,
        version=f"{build.fleetune}+{build.tier}",
        kit=build.kit,
        compatible=args.compatible,
        key=args.key,
        certificate=args.cert,
        keyring=args.keyring or args.cert,
    )
    print(out)  # noqa: T201
