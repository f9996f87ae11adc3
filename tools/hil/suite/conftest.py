"""What tests of a board share."""

pytest_plugins = ["fleetune.tools.hil.plugin"]
