import pytest

from tinyanl import models


@pytest.fixture(autouse=True, scope="session")
def float32():
    """Tests compare exact numbers: float32 even where the CPU has bf16, but for processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "half", lambda device: device.type == "cuda")
        yield
