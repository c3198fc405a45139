"""The job of job_flow.py with two ids a patch."""

from ml_collections import ConfigDict

from tests.contracts.toys import job_flow


def get_config() -> ConfigDict:
    """Everything that the run is made of."""
    config, toys = job_flow.get_config(), "tests.contracts.toys"
    config.tokenizer = ConfigDict(dict(name=f"{toys}.halves"))
    config.generator = ConfigDict(dict(name=f"{toys}.pairs", width=32))
    config.sampling = ConfigDict(dict(scale=2.0, top_p=0.95))
    return config
