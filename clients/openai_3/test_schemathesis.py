"""`schemathesis`: requests made from the server's own OpenAPI document, well formed and not. None
may end in a 5xx, and every answer must be one of those that the document promises."""

import pathlib
import subprocess
import sys

import server as servers

# Random cases for each operation, besides those at the document's own limits.
CASES = 100
TIME_MAX_S = 90

# A document cannot say all that makes a request valid: of two fields one, prompts that fit, what a
# template accepts. So a 400 for what it calls valid is no failure.
LEFT_OUT = "positive_data_acceptance"


def fuzz(server, folder, *flags):
    command = [pathlib.Path(sys.executable).parent / "schemathesis", "run"]
    command += [f"{server.url}/openapi.json", "--checks=all", f"--exclude-checks={LEFT_OUT}"]
    command += [f"--max-examples={CASES}", "--seed=1", "--generation-database=none"]
    command += ["--request-timeout=10", "--continue-on-failure", "--suppress-health-check=all"]
    command += ["--no-color", *flags]
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIME_MAX_S,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Tested: " in ran.stdout, ran.stdout


def test_every_operation(tmp_path):
    with servers.fake() as server:
        fuzz(server, tmp_path)
        server.wait_until_idle()
        assert server.get("/v1/models")["data"]


def test_every_operation_with_a_model_and_a_key(tmp_path):
    """Without the key every operation refuses, but for the one that the document leaves open."""
    with servers.minisgl("--api-key", "sesame") as server:
        fuzz(server, tmp_path, "--max-examples=10", "--header=Authorization: Bearer sesame")
