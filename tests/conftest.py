"""Eight devices for all tests: the flag must stand before JAX starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import matplotlib as mpl

mpl.use("Agg")
