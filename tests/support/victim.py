"""A process with a connection and a Will: python victim.py HOST PORT TOPIC KEEPALIVE USERNAME PASSWORD."""

from __future__ import annotations

import sys
import uuid

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

host, port, topic, keepalive, username, password = sys.argv[1:]
client = mqtt.Client(CallbackAPIVersion.VERSION2, f"victim-{uuid.uuid4().hex}", protocol=mqtt.MQTTv5)
if username:
    client.username_pw_set(username, password)
client.will_set(topic, b"gone", qos=1, retain=True)
client.on_connect = lambda *_: print("connected", flush=True)  # noqa: T201 - this is how it reports
client.connect(host, int(port), int(keepalive))
client.loop_start()
sys.stdin.read()
client.disconnect()
client.loop_stop()
