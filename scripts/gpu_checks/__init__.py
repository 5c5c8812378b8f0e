"""The checks of `scripts/gpu-check`: what training needs of one GPU, measured beside what the formulas say."""
