"""One import, from delivered rows to committed parts, in memory bounded by the largest group or day.

    read    validate batch after batch; good rows are split by request, bad ones go to the quarantine
    settle  per group of requests: duplicates, what is already present, completion with sampled candidates
    write   per day: sort, write a part; then the index

The share of bad rows is judged between `settle` and `write`, before anything reaches the store.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.contract import Dataset, engagement_schema, item_schema, user_schema
from engagement.errors import EvergreenError
from engagement.files import name_part, read_part, write_part
from engagement.index import Part, Room, from_us, load_index, save_index
from engagement.settle import STORED, settle
from engagement.spill import DAY_US, RequestSpill, TimeSpill, request_hash
from engagement.validate import BAD, MAX_BAD_SHARE, check_engagements, check_profiles, to_stored
from engagement.profiles import ...
