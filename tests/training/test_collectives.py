"""What four devices send each other, against what the program must send."""

import jax
import jax.numpy as jnp
import pytest

from gfa_jax.training import collectives, layout


def program(function, *shapes):
    mesh = layout.data_mesh(jax.devices()[:4])
    shardings = tuple(
        layout.replicated(mesh) if index == 0 else layout.split(mesh)
        for index in range(len(shapes))
    )
    jitted = jax.jit(function, in_shardings=shardings, out_shardings=layout.replicated(mesh))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jitted.lower(*arguments).compile().as_text()


def loss(weights, inputs):
    return jnp.mean(jnp.tanh(inputs @ weights))


def test_a_gradient_is_reduced_once():
    found = collectives.count(program(jax.grad(loss), (64, 32), (16, 64)))
    assert found == {"all-reduce": (1, 4 * 64 * 32)}


def test_collectives_in_loops_count_as_often_as_they_run():
    def looped(weights, inputs):
        def total(_, value):
            return jnp.sin(value + jnp.sum(jnp.tanh(inputs @ weights) * value))

        return jax.lax.fori_loop(0, 5, total, jnp.float32(1)), jax.grad(loss)(weights, inputs)

    found = collectives.count(program(looped, (64, 32), (16, 64)))
    assert found == {"all-reduce": (6, 4 * 5 + 4 * 64 * 32)}


def test_what_is_wanted_everywhere_is_gathered():
    found = collectives.count(program(lambda weights, inputs: inputs * 2, (1,), (16, 64)))
    assert found == {"all-gather": (1, 4 * 16 * 64)}


def test_one_device_sends_nothing():
    text = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 32)), jnp.ones((16, 64))).compile().as_text()
    assert collectives.count(text) == {}


LOOP = """
%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %a = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), channel_id=1
  %b = bf16[32]{0} all-gather-done(%a)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], bf16[8]{0}) while(%t), condition=%cond, body=%body, backend_config={TRIPS}
  ROOT %r = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%y, %z), to_apply=%add
}
"""


def test_asynchronous_collectives_count_once_and_by_their_results():
    text = LOOP.replace("TRIPS", '"known_trip_count":{"n":"7"}')
    assert collectives.count(text) == {
        "all-gather": (7, 7 * 2 * 32),
        "all-reduce": (1, 4 * (4 + 6)),
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%a = (f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%x)",
            {"collective-permute": (1, 4096)},
        ),
        (
            "%a = ((f32[1024], f32[512]), (f32[2048], f32[1024])) all-gather-start(%x, %y)",
            {"all-gather": (1, 4 * 3072)},
        ),
        (
            "%a = ((f32[1024]{0}), f32[256]{0}) reduce-scatter-start(%x)",
            {"reduce-scatter": (1, 1024)},
        ),
        ("%a = f32[8]{0} all-reduce-start(%x), to_apply=%add", {"all-reduce": (1, 32)}),
        ("%a = c64[8]{0} all-reduce(%x), to_apply=%add", {"all-reduce": (1, 64)}),
        ("%a = f32[8] conditional(%i, %x, %y), true_computation=%s, false_computation=%l", None),
        ("%a = f32[8] conditional(%i, %x, %y), branch_computations={%s, %l}", None),
        ("%a = f32[8]{0} async-done(%w), calls=%l", {}),
    ],
)
def test_forms_of_collectives(line, expected):
    text = f"""
%s (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} all-reduce(%p), to_apply=%add
}}

%l (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[64]{{0}} all-gather(%p)
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  {line}
}}
"""
    assert collectives.count(text) == ({"all-gather": (1, 256)} if expected is None else expected)


def test_unknown_types_are_refused():
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %a = q7[8]{0} all-gather(%x)\n}\n"
    with pytest.raises(ValueError, match=r"q7\[8\], an unknown type"):
        collectives.count(text)


def test_what_a_ring_sends():
    def sent(kind, num_bytes, num_devices):
        return collectives.sent_bytes({kind: collectives.Traffic(1, num_bytes)}, num_devices)

    assert sent("all-reduce", 800, 1) == 0
    assert sent("all-reduce", 800, 8) == 1400
    assert sent("all-gather", 800, 8) == 700
    assert sent("reduce-scatter", 100, 8) == 700
    assert sent("collective-permute", 800, 8) == 800


def test_unknown_numbers_of_iterations_are_refused():
    with pytest.raises(ValueError, match="no known number of iterations"):
        collectives.count(LOOP)
