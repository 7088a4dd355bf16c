"""The one tolerance table: largest absolute difference from the reference, for values of order one."""

PIXEL_VALUES = 1e-5
FEATURES = 1e-5
HIDDEN_STATES = 1e-4
LOGITS = 1e-3
# image_uint8: at most this many levels, on at most this share of the values (truncation turns rounding into a level).
IMAGE_LEVELS = 1
IMAGE_SHARE = 1e-3
# With the matrices stored in float16: 4 layers and the projector, each rounded to 11 bits; measured 2.2e-3.
FEATURES_FLOAT16 = 5e-3
