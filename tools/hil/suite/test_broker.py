"""A board reaches its broker, and the broker lets it do what is its own, and nothing else."""

from __future__ import annotations

import json

import pytest

from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.hil.protection import BrokerRights
from fleetune.tools.places import STATE
from fleetune.tools.rig import Rig

_PUBLISH = """\
import json
from pathlib import Path
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.identity.folder import read_identity
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Link, Refused

address, fleet, name, topics = json.loads({arguments!r})
found, own = {{}}, f"ft/1/{{fleet}}/dn/{{name}}/+"
seals = Seals(read_identity(Path("/{state}/identity")))
for topic in topics:
    link = Link(BrokerAddress.parse(address), f"{{fleet}}-{{name}}-hil", subscriptions=[own], seals=seals)
    link.connect(60.0)
    link.publish(topic, b"{{}}")
    events = []
    while not link.idle:
        events += link.events(0.1)
    found[topic] = [event.reason for event in events if isinstance(event, Refused)]
    link.close()
print(json.dumps(found))
"""


@pytest.mark.protected_by(BrokerRights())
def test_the_broker_takes_from_a_board_what_is_its_own_and_nothing_else(
    fleet_device: DeviceUnderTest, rig: Rig
) -> None:
    own, root = fleet_device.name, f"ft/1/{rig.fleet.name}"
    denied = [f"{root}/up/another/x/m", f"{root}/st/another", f"{root}/agg/st", f"{root}/g/fedms/current", "elsewhere"]
    broker = json.loads(fleet_device.run(f"cat /{STATE}/board/seed.json"))["broker"]
    arguments = json.dumps([broker, rig.fleet.name, own, [f"{root}/up/{own}/echo", *denied]])
    found = json.loads(fleet_device.python(_PUBLISH.format(arguments=arguments, state=STATE)))
    assert found.pop(f"{root}/up/{own}/echo") == []
    assert found == {topic: ["Not authorized"] for topic in denied}
