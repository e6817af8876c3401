"""The parts of peak_memory.py: what is measured, fits, the study, tables and curves."""
