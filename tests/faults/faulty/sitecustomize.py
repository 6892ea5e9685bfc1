"""Python imports this where the folder is on its path: a worker takes the fault of its rank from GPTCLI_FAULTS."""

import json
import os

if fault := json.loads(os.environ.get("GPTCLI_FAULTS", "{}")).get(os.environ.get("RANK")):
    from tests.driver import be_faulty

    be_faulty(fault)
