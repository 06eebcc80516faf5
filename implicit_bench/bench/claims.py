"""Which ratio speaks to which claim of the papers. Sources: arXiv 2201.12240, tables for CIFAR-10 small and large and
ImageNet small, lowest and highest cell; the abstract's own 1.11-3.19x and 2.8-5.9x are not in its tables."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    id: str
    slower: str  # the model in the numerator
    faster: str
    measure: str  # train, backward, predict
    paper: str


CLAIMS = (
    Claim("R1", "neural_ode", "cdeq", "train", "2.14–4.10×"),
    Claim("R2", "neural_ode", "cdeq", "backward", "4.75–6.18×"),
    Claim("R3", "cdeq", "skip_cdeq", "backward", "0.89–4.93×"),
    Claim("R3", "cdeq", "skip_reg_cdeq", "backward", "1.83–5.91×"),
    Claim("R4", "cdeq", "skip_cdeq", "train", "0.93–1.84×"),
    Claim("R4", "cdeq", "skip_reg_cdeq", "train", "1.11–1.95×"),
    Claim("R5", "deq", "cdeq", "predict", "0.68–2.07×"),
    Claim("R6", "neural_ode", "cdeq", "predict", "0.95–1.52×"),
    Claim("R9", "cdeq", "deq", "train", "1.16–2.05×"),
    Claim("–", "cdeq", "explicit", "train", ""),  # the price of being implicit
)
