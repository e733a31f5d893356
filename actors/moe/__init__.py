"""Pure torch math of the mixture of experts. Shape letters used throughout `actors`:

T tokens, D model width, E experts, K experts a token, P token-expert pairs (P = T * K in all), I expert width,
L MoE layers, G expert groups, B sequences, S positions, V vocabulary.
"""
