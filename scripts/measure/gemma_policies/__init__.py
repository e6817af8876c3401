"""What `policy_costs.py` is made of: a small Gemma, what is run and counted, tables and plots."""
