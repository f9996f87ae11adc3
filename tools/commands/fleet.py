"""``fleetune fleet``: who belongs to a fleet."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_authority, add_command
from fleetune.tools.text import utc

if TYPE_CHECKING:
    from fleetune.server.authority.authority import Authority

log = logging.getLogger(__name__)


def register(subparsers: Any) -> None:
    """Add the command and its subcommands."""
    parser = add_command(
        subparsers,
        "fleet",
        summary="say who belongs to a fleet: its authority, certificates, tokens, revocations",
        description=(
            "Lead a fleet's authority: a folder on a machine of yours whose keys sign who belongs to the fleet. With\n"
            "it the broker lets in nobody else, under no other name, and every message shows from whom it is."
        ),
        examples=(
            "  fleetune fleet init --fleet fleet.yaml --host broker.local    keys, and all that the broker needs\n"
            "  mosquitto -c authority/broker/mosquitto.conf\n"
            "  fleetune fleet serve                          lets devices in, and renews what they have\n"
            "  fleetune fleet enroll nano-1                  a token for a device, to be used once\n"
            "  fleetune fleet show\n"
            "  fleetune fleet revoke nano-1                  it is out, at once\n"
            "  fleetune fleet rotate aggregator              new keys\n"
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _register_init(actions)
    _register_enroll(actions)
    _register_serve(actions)
    _register_show(actions)
    _register_revoke(actions)
    _register_rotate(actions)
    _register_sign(actions)


def _add(actions: Any, name: str, *, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = add_command(actions, name, summary=summary, description=description, examples=examples)
    add_authority(parser)
    return parser


# --- init -------------------------------------------------------------------------------------------------------


def _register_init(actions: Any) -> None:
    parser = _add(
        actions,
        "init",
        summary="make an authority, and all that the broker and the aggregator need of it",
        description=(
            "Make the authority of a fleet. In its folder: authority.json with its keys (keep it to yourself, and a\n"
            "backup of it), members/aggregator for `fleetune serve --identity`, broker/ with all that Mosquitto needs."
        ),
        examples=(
            "  fleetune fleet init --fleet fleet.yaml --host broker.local --host 192.168.1.10\n"
            "  fleetune fleet init --fleet fleet.yaml --host broker --installed /etc/mosquitto/fleetune\n"
        ),
    )
    parser.add_argument("--fleet", metavar="FILE", type=Path, required=True, help="fleet file: only its name counts")
    parser.add_argument(
        "--host",
        dest="hosts",
        action="append",
        required=True,
        metavar="HOST",
        help="name or address under which devices reach the broker; may be given several times, the first is told them",
    )
    parser.add_argument("--port", type=int, default=8883, help="the broker's port for members (default: %(default)s)")
    parser.add_argument(
        "--enrolment-port", type=int, default=8884, help="its port for devices with a token (default: %(default)s)"
    )
    parser.add_argument(
        "--days",
        type=float,
        default=30.0,
        metavar="N",
        help="life of a device's credential; it renews it after two thirds of that (default: %(default)s)",
    )
    parser.add_argument(
        "--installed", metavar="DIR", type=Path, help="where broker/ will be on the broker's machine (default: here)"
    )
    parser.set_defaults(run=_init)


def _init(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.profiles.fleet import read_fleet
    from fleetune.server.authority.authority import Lives, Site
    from fleetune.server.authority.founding import AGGREGATOR_FOLDER, BROKER_FOLDER, found
    from fleetune.server.authority.mosquitto import CONFIG

    if not 0 < args.days <= 3650:
        raise ConfigError(f"--days: {args.days} is out of range", "choose from above 0 to 3650")
    for name, port in (("--port", args.port), ("--enrolment-port", args.enrolment_port)):
        if not 1 <= port <= 65535:
            raise ConfigError(f"{name}: {port} is out of range", "choose from 1 to 65535")
    fleet, folder = read_fleet(args.fleet), args.authority
    installed = str(args.installed.resolve()) if args.installed else ""
    site = Site(tuple(args.hosts), args.port, args.enrolment_port, installed)
    found(folder, fleet.name, site, Lives(device=args.days)).close()
    _say(
        f"{folder / 'authority.json'} has the keys of the fleet {fleet.name}: keep it to yourself, and a backup of it",
        f"broker:      mosquitto -c {(args.installed or folder / BROKER_FOLDER) / CONFIG}",
        f"devices:     fleetune fleet serve --authority {folder}; then for each: fleetune fleet enroll ID",
        f"aggregator:  fleetune serve --identity {folder / AGGREGATOR_FOLDER} --broker {site.broker} …",
    )


# --- enroll -----------------------------------------------------------------------------------------------------


def _register_enroll(actions: Any) -> None:
    parser = _add(
        actions,
        "enroll",
        summary="make tokens that let devices in, once each",
        description=(
            "Make a token for each device: with it the device gets a certificate for keys that it makes itself. A\n"
            "token counts once, and for some hours; a new one for the same device makes the one before worthless.\n"
            "Treat it as a password until it is used."
        ),
        examples=(
            "  fleetune fleet enroll nano-1                                 prints the token\n"
            "  fleetune fleet enroll --fleet fleet.yaml --out tokens        a file for each device of the fleet\n"
            "  fleetune fleet enroll nano-1 --hours 1 --json | jq -r '.[0].token'\n"
        ),
    )
    parser.add_argument("devices", nargs="*", metavar="ID", help="devices")
    parser.add_argument("--fleet", metavar="FILE", type=Path, help="fleet file: a token for each of its devices")
    parser.add_argument("--hours", type=float, default=24.0, metavar="H", help="life of a token (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write each token to DIR/ID.token instead")
    parser.add_argument("--json", action="store_true", help="print the tokens as JSON")
    parser.set_defaults(run=_enroll)


def _enroll(args: argparse.Namespace) -> None:
    import json

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.edge.protocol.identity.folder import write_private
    from fleetune.profiles.fleet import read_fleet
    from fleetune.server.authority.founding import BROKER_FOLDER

    devices, fleet = list(args.devices), read_fleet(args.fleet) if args.fleet is not None else None
    if fleet is not None:
        known = [device.id for device in fleet.devices]
        if strange := sorted(set(devices) - set(known)):
            raise ConfigError(f"{args.fleet} has no device {', '.join(strange)}", f"use one of {', '.join(known)}")
        devices = devices or known
    if not devices:
        raise ConfigError("no device is named", "name some, or --fleet for all of a fleet file")
    if not 0 < args.hours <= 24 * 365:
        raise ConfigError(f"--hours: {args.hours} is out of range", "choose from above 0 to 8760")
    with _opened(args.authority) as authority:
        if fleet is not None and fleet.name != authority.fleet:
            raise ConfigError(
                f"{args.fleet} is of the fleet {fleet.name}, {args.authority} of {authority.fleet}",
                "name the fleet file and the --authority of one fleet",
            )
        tokens = [authority.make_token(device, args.hours) for device in devices]
        revoked = {row.name for row in authority.ledger.members() if row.revoked is not None}
        if again := sorted(revoked.intersection(devices)):
            _give_back_rights(authority, args.authority / BROKER_FOLDER, again)
    if args.out is not None:
        for token in tokens:
            write_private(args.out / f"{token.device}.token", f"{token.text}\n".encode())
        what = "1 token is" if len(tokens) == 1 else f"{len(tokens)} tokens are"
        _say(f"{what} in {args.out}, for {args.hours:g} hours")
    elif args.json:
        rows = [{"device": token.device, "token": token.text, "expires": utc(token.expires)} for token in tokens]
        _say(json.dumps(rows, indent=1))
    else:
        _say(*(token.text if len(tokens) == 1 else f"{token.device} {token.text}" for token in tokens))


def _give_back_rights(authority: Authority, folder: Path, names: list[str]) -> None:
    from fleetune.server.authority.mosquitto import reload_broker, write_revocations

    write_revocations(authority, folder)
    if not reload_broker(folder):
        # Not on standard output, which holds the tokens.
        log.warning(
            "%s: revoked before; copy %s/acl to the broker, and reload it (kill -HUP), or it still denies everything",
            *(", ".join(names), folder),
        )


# --- serve ------------------------------------------------------------------------------------------------------


def _register_serve(actions: Any) -> None:
    parser = _add(
        actions,
        "serve",
        summary="let devices in, and renew what they have, until stopped",
        description=(
            "Answer devices that come with a token, and those whose certificates are to be renewed; say to all who\n"
            "was revoked. A device renews after two thirds of its credential's life, so this may be away for days."
        ),
        examples="  fleetune fleet serve\n  fleetune fleet serve --authority /srv/authority --broker mqtts://10.0.0.2:8883\n",
    )
    _add_broker(parser)
    parser.set_defaults(run=_serve)


def _add_broker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--broker", metavar="URL", help="the fleet's broker (default: as it was told to `init`)")


def _serve(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.address import BrokerAddress
    from fleetune.edge.protocol.identity.folder import read_identity
    from fleetune.server.authority.desk import Desk
    from fleetune.server.authority.founding import AUTHORITY_FOLDER

    with _opened(args.authority) as authority:
        broker = BrokerAddress.parse(args.broker or authority.site.broker)
        Desk(authority, read_identity(args.authority / AUTHORITY_FOLDER), broker).run()


# --- show -------------------------------------------------------------------------------------------------------


def _register_show(actions: Any) -> None:
    parser = _add(
        actions,
        "show",
        summary="who belongs to the fleet, until when, and which tokens wait",
        description="Show the fleet's members and tokens. It needs no broker and changes nothing.",
        examples=(
            "  fleetune fleet show\n  fleetune fleet show --json | jq '.members[] | select(.state == \"expired\")'\n"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from fleetune.tools.text import columns

    with _opened(args.authority) as authority:
        now = authority.now()
        members, tokens = authority.ledger.members(), authority.ledger.tokens()
        newest = {(row.role, row.name): row for row in members}.values()
        expiring = {row.serial for row in authority.expiring()}
        shown = [(row, _member_state(row, now, soon=row.serial in expiring)) for row in newest]
        waiting = [(row, "used" if row.used else "expired" if row.expires < now else "waits") for row in tokens]
        if args.json:
            document = {
                "fleet": authority.fleet,
                "trust": authority.trust.version,
                "members": [asdict(row) | {"state": state} for row, state in shown],
                "tokens": [asdict(row) | {"state": state} for row, state in waiting],
            }
            _say(json.dumps(document, indent=1))
            return
        _say(f"fleet {authority.fleet}, version {authority.trust.version} of its trust document", "")
        rows = [[row.role, row.name, state, _day(row.expires), row.key or "-"] for row, state in shown]
        _say(columns([["role", "name", "state", "until", "key"], *rows]))
        if waiting:
            rows = [[row.device, state, _day(row.expires), row.id] for row, state in waiting]
            _say("", columns([["token for", "state", "until", "id"], *rows]))


def _member_state(row: Any, now: float, *, soon: bool) -> str:
    if row.revoked is not None:
        return "revoked"
    return "expired" if row.expires < now else "expires soon" if soon else "current"


def _day(when: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(when).astimezone().strftime("%Y-%m-%d %H:%M")


# --- revoke and rotate ------------------------------------------------------------------------------------------


def _register_revoke(actions: Any) -> None:
    parser = _add(
        actions,
        "revoke",
        summary="put a member out of the fleet, at once",
        description=(
            "Revoke all that a member has. Aggregator and devices refuse what it signs as soon as they hear the new\n"
            "trust document, which is said here; a Mosquitto that runs from the authority's folder is told to refuse\n"
            "its connections. Elsewhere copy broker/acl and broker/revoked.pem, and reload the broker."
        ),
        examples="  fleetune fleet revoke nano-1\n  fleetune fleet revoke nano-1 nano-2 --offline\n",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="devices, or aggregator")
    _add_broker(parser)
    parser.add_argument(
        "--offline", action="store_true", help="do not connect: `fleetune fleet serve` will say it when it runs"
    )
    parser.set_defaults(run=_revoke)


def _revoke(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.server.authority.founding import BROKER_FOLDER
    from fleetune.server.authority.mosquitto import reload_broker, write_revocations

    with _opened(args.authority) as authority:
        known = {row.name for row in authority.ledger.members()}
        if strange := [name for name in args.names if name not in known]:
            raise ConfigError(f"{', '.join(strange)}: never had a credential", "see `fleetune fleet show`")
        for name in args.names:
            count = authority.revoke(name)
            _say(f"{name}: {count} credential{'' if count == 1 else 's'} revoked")
        folder = args.authority / BROKER_FOLDER
        write_revocations(authority, folder)
        if reload_broker(folder):
            _say("the broker on this machine refuses its connections from now on")
        else:
            _say(f"copy {folder}/acl and {folder}/revoked.pem to the broker, and reload it (kill -HUP)")
        if not args.offline:
            _tell(authority, args, {})


def _register_rotate(actions: Any) -> None:
    parser = _add(
        actions,
        "rotate",
        summary="replace keys: of the authority, the aggregator, the broker, or a device",
        description=(
            "Give a member new keys. `authority` takes two steps: after the first both keys count, so that devices\n"
            "that are away have time to hear of the new one, and to renew; then `--finish` lets go of the old one. A\n"
            "device that was away all the time has to enrol again. A device makes its new keys itself, as soon as it\n"
            "is told."
        ),
        examples=(
            "  fleetune fleet rotate aggregator            then start `fleetune serve` again\n"
            "  fleetune fleet rotate broker                then copy broker/ and reload the broker\n"
            "  fleetune fleet rotate nano-1\n"
            "  fleetune fleet rotate authority aggregator publisher\n"
            "  fleetune fleet rotate authority --finish      some weeks later, when all devices have renewed\n"
        ),
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="authority, aggregator, publisher, broker, or devices")
    _add_broker(parser)
    parser.add_argument("--finish", action="store_true", help="of the authority: the old key counts no more")
    parser.add_argument(
        "--force",
        action="store_true",
        help="finish, even if some have nothing of the new key: they have to enrol again",
    )
    parser.add_argument("--offline", action="store_true", help="do not connect; a device is not told then")
    parser.set_defaults(run=_rotate)


def _rotate(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.server.authority.founding import AGGREGATOR_FOLDER, AUTHORITY_FOLDER, BROKER_FOLDER, PUBLISHER_FOLDER
    from fleetune.server.authority.mosquitto import reload_broker, write_broker, write_revocations

    folders = {"aggregator": AGGREGATOR_FOLDER, "publisher": PUBLISHER_FOLDER}
    broker_folder = args.authority / BROKER_FOLDER
    with _opened(args.authority) as authority:
        rows = [row for row in authority.ledger.members() if row.role == "device" and row.revoked is None]
        devices = {row.name: row.key for row in rows}  # the newest of each comes last
        if strange := sorted(set(args.names) - devices.keys() - folders.keys() - {"authority", "broker"}):
            raise ConfigError(f"{', '.join(strange)}: is not a member", "see `fleetune fleet show`")
        for name in args.names:
            if name == "authority" and args.finish:
                authority.finish_rotation(force=args.force)
                _say("only the authority's new keys count from now on")
            elif name == "authority":
                authority.rotate()
                _say("the authority has new keys; the old ones count until `fleetune fleet rotate authority --finish`")
            elif name == "aggregator" or name == "publisher":
                authority.make_member(name, args.authority / folders[name])
                _say(
                    f"{args.authority / folders[name]} has new keys: copy it to where it is used, and start that again"
                )
            elif name in devices:
                _say(f"{name}: is {'not ' if args.offline else ''}told to renew")
        anew = {"broker", "authority"} & set(args.names)
        if anew:
            write_broker(authority, broker_folder)
        elif folders.keys() & set(args.names):
            write_revocations(authority, broker_folder)  # one that was revoked has its rights again
        if (anew or folders.keys() & set(args.names)) and not reload_broker(broker_folder):
            _say(f"copy {broker_folder} to the broker, and reload it (kill -HUP)")
        try:
            if not args.offline:
                _tell(authority, args, {name: key for name, key in devices.items() if name in args.names})
        finally:
            if anew:  # last: what the authority had counts for the broker before and after it has read its files
                authority.make_member("authority", args.authority / AUTHORITY_FOLDER)


def _tell(authority: Authority, args: argparse.Namespace, renew: dict[str, str]) -> None:
    """Say to all whom to trust, and to some to renew."""
    from fleetune.edge.protocol.address import BrokerAddress
    from fleetune.edge.protocol.identity.folder import read_identity
    from fleetune.server.authority.desk import Desk
    from fleetune.server.authority.founding import AUTHORITY_FOLDER

    broker = BrokerAddress.parse(args.broker or authority.site.broker)
    Desk(authority, read_identity(args.authority / AUTHORITY_FOLDER), broker).announce(renew)
    _say(f"version {authority.trust.version} of the trust document is out, on {broker}")


# --- sign -------------------------------------------------------------------------------------------------------


def _register_sign(actions: Any) -> None:
    parser = _add(
        actions,
        "sign",
        summary="sign packs, releases and images",
        description=(
            "Sign files, or packs: the signature goes beside the file (FILE.sig), for a pack beside its manifest,\n"
            "which has the hash of every other file. Devices with an identity take no pack without; `fleetune verify`\n"
            "looks at any file. Only members/publisher is needed where this runs."
        ),
        examples=(
            "  fleetune fleet sign packs/minilm\n"
            "  fleetune fleet sign dist/*.whl image.img --authority /srv/authority\n"
        ),
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="files, or folders of packs")
    parser.set_defaults(run=_sign)


def _sign(args: argparse.Namespace) -> None:
    import time

    from fleetune.edge.protocol.identity.folder import read_identity
    from fleetune.edge.protocol.identity.signature import sign_file
    from fleetune.server.authority.founding import PUBLISHER_FOLDER

    publisher = read_identity(args.authority / PUBLISHER_FOLDER)
    for path in args.paths:
        _say(f"{path}: {sign_file(path, publisher, time.time())}")


# --- shared -----------------------------------------------------------------------------------------------------


def _opened(folder: Path) -> Any:
    from contextlib import closing

    from fleetune.server.authority.authority import Authority

    return closing(Authority(folder))


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)  # noqa: T201
