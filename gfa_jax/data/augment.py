"""Data augmentation on the device, inside the compiled training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gfa_jax import _validate


def random_crop_flip(key: jax.Array, images: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    """Shifts each image by up to `padding` pixels and mirrors half of them.

    The standard CIFAR augmentation: pad with zeros (black for images in `[0, 1]`) on all four
    sides, crop back to the original size at a uniformly random offset, flip left-right with
    probability 1/2. Each example has its own key, so its crop is independent of the others'.

    Args:
      key: one PRNG key, split into one per example.
      images: `[B, H, W, C]`, any dtype; normally `float32`.
      padding: pixels on each side, a static integer; 0 for no shift.
      flip: static; whether to flip.

    Returns:
      Images of the same shape and dtype. With `padding=0` and `flip=False` they are `images` itself
      and the key is not used.

    Raises:
      ValueError: if `images` does not have four dimensions or `padding` is negative.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape [B, H, W, C], got {images.shape}")
    _validate.non_negative(padding=padding)
    if padding == 0 and not flip:
        return images

    def augment_one(example_key: jax.Array, padded: jax.Array) -> jax.Array:
        offset_key, flip_key = jax.random.split(example_key)
        row, column = jax.random.randint(offset_key, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(padded, (row, column, 0), images.shape[1:])
        if flip:
            crop = jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)
        return crop

    border = (padding, padding)
    padded_images = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    return jax.vmap(augment_one)(jax.random.split(key, len(images)), padded_images)
