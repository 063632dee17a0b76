"""Neuron-Guided Safe Decoding: when an expert may speak (neuron), how strongly (risk), and what it says (mix, expert)."""
