"""The stages, SFT and the judge's DPO: what one run trains, measures and writes."""
