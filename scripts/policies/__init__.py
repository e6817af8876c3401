"""What `compare_tp_policies.py` is made of: a small Gemma, what is run and counted, tables and plots."""
