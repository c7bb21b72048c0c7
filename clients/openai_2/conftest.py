"""What these clients need besides a server."""

import sys

import pytest
from server import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import smollm2_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer(minisgl, tmp_path_factory):
    """A folder with the model's tokenizer, for clients that count or encode by themselves."""
    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2_tokenizer.write_folder(minisgl.get("/model_info")["model_path"], folder)
    return folder
