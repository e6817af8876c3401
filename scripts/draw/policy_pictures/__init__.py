"""The part of two_policies.py that is drawn from closed forms."""
