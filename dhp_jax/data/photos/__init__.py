"""Photographs for super-resolution and denoising."""
