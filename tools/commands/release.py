"""``fleetune release``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command

if TYPE_CHECKING:
    from fleetune.tools.release.rollout import Rollout


def register(subparsers: Any) -> None:
    """Add the command and its actions."""
    parser = add_command(
        subparsers,
        "release",
        summary="publish kits and packs to a fleet: to canaries, then to a growing share",
        description=(
            "Publish new kits and packs to boards in the field. A release goes to canaries first, then to a share of\n"
            "the fleet that you let grow. A board whose agent does not come up with it goes back to the release\n"
            "before by itself, and never takes that one again.\n\n"
            "What is public is a folder of files for any web server. Its metadata are those of The Update Framework:\n"
            "who holds the server, or the way to it, can neither alter, nor bring back what is old, nor mix."
        ),
        examples=(
            "  fleetune release init --url https://updates.example.org/lab         once\n"
            "  fleetune release publish images/fleetune_0.2.0+t1_arm64.build.json --canary nano-1\n"
            "  fleetune release advance --share 0.25\n"
            "  fleetune release withdraw                                           back to the one before\n"
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = _add(actions, "init", "make a repository, with keys of its own", _init, " --url https://u.example.org")
    init.add_argument("--url", required=True, metavar="URL", help="where releases/public will be served")
    publish = _add(
        actions, "publish", "publish a release: what is not named stays as it was", _publish, " new.build.json"
    )
    publish.add_argument("builds", nargs="*", type=Path, metavar="BUILD", help="records of builds, one for each tier")
    publish.add_argument(
        "--pack", dest="packs", action="append", default=[], type=Path, metavar="DIR", help="a pack, signed; repeatable"
    )
    publish.add_argument(
        "--canary", dest="canaries", action="append", default=[], metavar="ID", help="gets it first; repeatable"
    )
    publish.add_argument(
        "--share", type=float, default=0.0, metavar="X", help="of the others, from 0 to 1 (default: %(default)s)"
    )
    advance = _add(actions, "advance", "let the newest release reach more of the fleet", _advance, " --share 0.25")
    advance.add_argument("--share", type=float, required=True, metavar="X", help="from 0 to 1")
    _add(actions, "withdraw", "bring the release before the newest back, to all, as a new one", _withdraw)
    _add(actions, "renew", "sign anew that what is there is the newest; each month, by cron", _renew)
    show = _add(actions, "show", "what goes to whom, and until when boards believe it", _show)
    show.add_argument("--json", action="store_true", help="as JSON")


def _add(actions: Any, name: str, summary: str, run: Any, example: str = "") -> argparse.ArgumentParser:
    parser = add_command(
        actions,
        name,
        summary=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        examples=f"  fleetune release {name}{example}\n",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("releases"), help="the repository (default: %(default)s)"
    )
    parser.set_defaults(run=run)
    return parser


def _init(args: argparse.Namespace) -> None:
    from fleetune.tools.release.repository import KEYS, PUBLIC, Releases

    with Releases.make(args.out, args.url):
        pass
    _say(
        f"{args.out / PUBLIC}  serve it at {args.url}",
        f"{args.out / KEYS}  for you alone: who has them can let boards run anything; keep a copy elsewhere",
    )


def _publish(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.release.publish import publish
    from fleetune.tools.release.repository import Releases

    _check_share(args.share)
    if not args.builds and not args.packs:
        raise ConfigError("there is nothing to publish", "name builds (*.build.json), or packs with --pack")
    with Releases(args.out) as releases:
        rollout = publish(releases, args.builds, args.packs, args.canaries, args.share)
    _say(*_lines(rollout))


def _advance(args: argparse.Namespace) -> None:
    import msgspec

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.release.repository import Releases

    _check_share(args.share)
    with Releases(args.out) as releases:
        newest = releases.rollout
        if newest is None:
            raise ConfigError("nothing is published yet", "`fleetune release publish`")
        rollout = msgspec.structs.replace(newest, share=args.share)
        releases.publish(rollout, {})
    _say(*_lines(rollout))


def _withdraw(args: argparse.Namespace) -> None:
    import msgspec

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.release.repository import Releases

    with Releases(args.out) as releases:
        rollouts = list(releases.rollouts())
        earlier = [rollout for rollout in rollouts if rollout.number < rollouts[0].number]
        if not earlier:
            raise ConfigError("there is no release before the newest", "publish another: `fleetune release publish`")
        rollout = msgspec.structs.replace(earlier[0], number=rollouts[0].number + 1, share=1.0)
        releases.publish(rollout, {})
    _say(*_lines(rollout))


def _renew(args: argparse.Namespace) -> None:
    from fleetune.tools.release.repository import Releases

    with Releases(args.out) as releases:
        releases.renew()
        _say(f"boards believe it until {releases.fresh_until.isoformat()}")


def _show(args: argparse.Namespace) -> None:
    import msgspec

    from fleetune.tools.release.repository import Releases

    with Releases(args.out) as releases:
        rollout, until, url = releases.rollout, releases.fresh_until.isoformat(), releases.url
    if args.json:
        newest = None if rollout is None else msgspec.to_builtins(rollout)
        _say(json.dumps({"url": url, "fresh_until": until, "rollout": newest}, indent=1))
        return
    _say(*(["nothing is published yet"] if rollout is None else _lines(rollout)), f"{url}, believed until {until}")


def _lines(rollout: Rollout) -> list[str]:
    first = f", and {', '.join(rollout.canaries)} before them" if rollout.canaries else ""
    parts = [part.target for part in (*rollout.kits.values(), *rollout.packs.values())]
    return [f"release {rollout.number}: {rollout.share:.0%} of the fleet{first}", *(f"  {part}" for part in parts)]


def _check_share(share: float) -> None:
    from fleetune.edge.protocol.errors import ConfigError

    if not 0 <= share <= 1:
        raise ConfigError(f"--share: {share} is out of range", "choose from 0 to 1")


def _say(*lines: str) -> None:
    for line in lines:
        print(line)  # noqa: T201
