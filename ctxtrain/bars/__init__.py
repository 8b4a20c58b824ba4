"""Bars as market programs export them, and the labelled windows made of them."""
