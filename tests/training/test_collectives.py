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


@pytest.mark.parametrize(
    ("groups", "size", "stride"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 1),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, 4),
        ("replica_groups=[1,8]<=[8]", 8, 1),
        ("replica_groups=[4,2]<=[8]", 2, 1),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4, 2),
        ("replica_groups=mesh['a'=1,'b'=8] {'b'}", 8, 1),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", 2, 1),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4, 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8, 1),
        # The mesh's own order: devices 0, 2, 4, 6, and then 1, 3, 5, 7.
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 2, 1),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4, 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 8, 1),
        ("replica_groups={}", 8, 1),
        ("source_target_pairs={{0,1},{1,0}}", 8, 1),
    ],
)
def test_groups(groups, size, stride):
    text = f"ENTRY %m (p: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} all-gather(%p), {groups}\n}}\n"
    assert collectives.transfers(text, 8) == [("all-gather", size, stride, 1, 16)]


def test_groups_of_a_compiled_program():
    """Sums over one axis of a mesh, and over the other, as XLA writes them."""
    mesh = layout.data_mesh(jax.devices()[:4], fsdp=2)

    def sums(inputs):
        return (
            jax.lax.psum(inputs, "data"),
            jax.lax.psum(inputs * inputs, "fsdp")[:3],
            jax.lax.psum(jnp.sin(inputs), ("data", "fsdp"))[:1],
        )

    spec = jax.sharding.PartitionSpec(("data", "fsdp"))
    mapped = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = mapped.lower(jax.ShapeDtypeStruct((32,), jnp.float32)).compile().as_text()
    found = {(one.size, one.stride) for one in collectives.transfers(text, 4)}
    assert found == {(4, 1), (2, 1), (2, 2)}
    total = collectives.count(text)["all-reduce"]
    assert total.num_bytes == sum(one.num_bytes for one in collectives.transfers(text, 4))


def test_unknown_numbers_of_iterations_are_refused():
    with pytest.raises(ValueError, match="no known number of iterations"):
        collectives.count(LOOP)
