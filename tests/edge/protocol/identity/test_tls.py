"""What TLS asks of both sides, before a broker is there."""

from __future__ import annotations

import os
import pty
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import IdentityError
from fleetune.edge.protocol.identity.folder import ROOTS_FILE, TLS_FILE
from fleetune.edge.protocol.identity.tls import client_context, enrolment_context, out_of_date
from support.guarded import GuardedFleet


@pytest.fixture
def folder(lab: GuardedFleet, tmp_path: Path) -> Path:
    lab.copy("nano-1", tmp_path / "identity")
    return tmp_path / "identity"


def test_both_sides_are_asked_who_they_are_and_nothing_older_than_tls_1_3_will_do(folder: Path) -> None:
    context = client_context(folder)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert enrolment_context().minimum_version is ssl.TLSVersion.TLSv1_3


def test_the_systems_authorities_do_not_count(folder: Path) -> None:
    subjects = [dict(pair[0] for pair in ca["subject"]) for ca in client_context(folder).get_ca_certs()]
    assert [subject["organizationName"] for subject in subjects] == ["lab"]


@pytest.mark.parametrize("file", [TLS_FILE, ROOTS_FILE])
def test_a_file_that_is_missing_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(IdentityError, match=f"{folder / file} is missing"):
        client_context(folder)


@pytest.mark.parametrize("file", [TLS_FILE, ROOTS_FILE])
@pytest.mark.parametrize("content", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_that_holds_something_else_is_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(IdentityError, match=str(folder / file)):
        client_context(folder)


def test_a_certificate_for_another_key_is_refused(lab: GuardedFleet, folder: Path) -> None:
    own, other = (path.read_text() for path in (folder / TLS_FILE, lab.home("nano-2") / TLS_FILE))
    begins = "-----BEGIN CERTIFICATE-----"
    (folder / TLS_FILE).write_text(own.partition(begins)[0] + begins + other.partition(begins)[2])
    with pytest.raises(IdentityError, match=r"(?i)mismatch"):
        client_context(folder)


def test_a_key_that_is_encrypted_is_refused_and_nobody_is_asked_for_its_password(folder: Path) -> None:
    """An agent that starts with the board has nobody to ask."""
    command = ["openssl", "pkcs8", "-topk8", "-in", folder / TLS_FILE, "-passout", "pass:secret"]
    encrypted = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (folder / TLS_FILE).write_text(
        encrypted + (folder / TLS_FILE).read_text().partition("-----END PRIVATE KEY-----")[2]
    )
    said = on_a_terminal(f"from {client_context.__module__} import *; client_context(Path({str(folder)!r}))")
    assert "pass phrase" not in said
    assert "IdentityError" in said


def on_a_terminal(code: str) -> str:
    """What a process says that has a terminal of its own, at which nobody types."""
    process, terminal = pty.fork()
    if process == 0:
        signal.alarm(20)
        os.execv(sys.executable, [sys.executable, "-c", f"from pathlib import Path; {code}"])  # noqa: S606
    said = b""
    with suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as reader:  # the end is an error there
        while b"pass phrase" not in said and (more := reader.read(4096)):
            said += more
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return said.decode()


def in_openssls_form(when: datetime) -> str:
    return when.strftime("%b %d %H:%M:%S %Y GMT")


@pytest.mark.parametrize(("passed", "expected"), [
    (lambda end: end - timedelta(days=9), ""),
    (lambda end: end + timedelta(minutes=4), ""),
    (lambda end: end + timedelta(minutes=6), "it has expired on 2030-05-01, and 2030-05-01 has passed for sure"),
    (lambda end: end + timedelta(days=2), "it has expired on 2030-05-01, and 2030-05-03 has passed for sure"),
])  # fmt: skip
def test_a_certificate_is_out_of_date_when_its_end_has_passed_for_sure(
    passed: Callable[[datetime], datetime], expected: str
) -> None:
    end = datetime(2030, 5, 1, 12, tzinfo=timezone.utc)
    assert out_of_date({"notAfter": in_openssls_form(end)}, passed(end).timestamp()) == expected


def test_no_certificate_is_not_out_of_date() -> None:
    assert out_of_date({}, 2**40) == ""
