"""Architectures: the skeleton of a model, its blocks one at a time, and what calibration text does to them.

The only folder that touches transformers' modelling code.
"""
