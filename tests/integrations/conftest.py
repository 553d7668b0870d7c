"""A server process, and frameworks kept quiet. Imports no torch: the ordinary run reads this."""

import os
import warnings

import pytest

from tests.client.conftest import serving

# These need frameworks that the ordinary run does not install: `make test-integrations` sets it.
ON = os.environ.get("GRADPOST_TEST_INTEGRATIONS") == "1"
collect_ignore_glob = [] if ON else ["test_*.py"]

QUIET = {
    "HF_HUB_OFFLINE": "1",  # a test that would load something fails
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",  # tiny models; and sums that are the same in every run
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
}

if ON:
    os.environ.update(QUIET)  # before a framework is imported, which reads it then
    with warnings.catch_warnings():  # theirs, at import, are not this repository's
        warnings.simplefilter("ignore")
        import accelerate
        import lightning
        import transformers

        transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def url():
    """Of a server process."""
    with serving("--port", "0") as line:
        yield line.rpartition(" ")[2]


@pytest.fixture(autouse=True)
def _from_the_start(tmp_path, monkeypatch):
    """Each test in a folder of its own, without what accelerate keeps for the process."""
    monkeypatch.chdir(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    lightning.seed_everything(0, verbose=False)
