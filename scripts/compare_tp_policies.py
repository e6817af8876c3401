"""`scripts/measure/policy_costs.py`, by the name it had before."""

from moved import run

run("measure/policy_costs.py")
