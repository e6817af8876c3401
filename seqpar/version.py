"""The version, said here alone: the build reads it, and ranks compare it."""

VERSION = "0.1.0"
