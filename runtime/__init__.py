"""Run HealthGPT bundles: a medical picture and words in, text or a picture out."""
