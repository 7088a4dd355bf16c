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
# The same in bfloat16, 8 bits; measured 2.1e-2.
FEATURES_BFLOAT16 = 4e-2
# The same float32 arithmetic on the same weights, dequantised where they are stored in blocks; measured 2e-5.
LOGITS_SAME_ARITHMETIC = 1e-4
# With caches in float16, the same rounding in the reference: a key that lies between two of its numbers may fall to
# either; measured 1.0e-3, and 2.1e-3 on a machine without AVX-512. Float32 caches would differ by 3e-3 to 9e-3.
LOGITS_FLOAT16_CACHES = 2.5e-3
# The same with caches in int8; measured 1.1e-4. Float32 caches would differ by 0.09 to 0.17.
LOGITS_INT8_CACHES = 1e-3
# With int8 or int4 weights ONNX Runtime rounds activations to 8 bits as well: largest and mean difference from the
# dequantised weights in float32, of logits with a standard deviation of 1.9; measured 0.61 and 0.042.
LOGITS_8_BIT_LARGEST = 0.7
LOGITS_8_BIT_MEAN = 0.06
# The same of the vision tower's features, of order one; measured 0.070.
FEATURES_8_BIT = 0.1
