"""Suites of evaluations: what is measured of an encoder, each by a module that makes its cells."""
