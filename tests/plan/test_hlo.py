# ruff: noqa: E501 - lines as the backends write them
"""The reader of HLO text."""

from lora_jax.plan.hlo import collectives

TPU = """HloModule jit_step, is_scheduled=true

%add.clone (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.3.clone (input: bf16[16,4096]) -> bf16[16,1024] {
  %all-reduce.7 = bf16[16,4096]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add.clone
  ROOT %cut = bf16[16,1024]{1,0} dynamic-slice(%all-reduce.7, %zero, %start), dynamic_slice_sizes={16,1024}
}

%inner.cond (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%inner.body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[1,4096,16]{1,2,0:T(8,128)(2,1)} all-gather(%part), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}
  %fusion.2 = bf16[16,1024]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.3.clone
}

%outer.cond (p: (s32[])) -> pred[] {
  %bound.2 = s32[]{:T(128)} constant(32)
  ROOT %lt.2 = pred[] compare(%i, %bound.2), direction=LT
}

%outer.body (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%inner.cond, body=%inner.body
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.2 = (s32[]{:T(128)}) while(%t), condition=%outer.cond, body=%outer.body
  %all-reduce.9 = f32[]{:T(128)} all-reduce(%loss), replica_groups={}, to_apply=%add.clone
  ROOT %permute = f32[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}
"""

CPU = """HloModule jit_step

%branch.0 (p: f32[8]) -> f32[8] {
  %reduce-scatter.1 = f32[2,8]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%branch.1 (p: f32[8]) -> f32[8] {
  ROOT %zeros = f32[8]{0} broadcast(%zero)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %chosen = f32[8]{0} conditional(%which, %a, %b), branch_computations={%branch.0, %branch.1}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[] constant(99)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %all-gather-start = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %all-gather-done = f32[16]{0} all-gather-done(%all-gather-start)
}
"""


PERMUTED = """HloModule jit_step

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=1], device_ids=([4,2]T(1,0)) {'axis_0'}, use_global_device_ids=true, to_apply=%add
}
"""


def sent(text, devices):
    return {one.kind: (one.count, one.bytes, one.largest) for one in collectives(text, devices)}


def test_tpu_text_loops_by_their_bound_and_reductions_that_scatter():
    gathered, reduced = 4096 * 16 * 2, 16 * 4096 * 2
    assert sent(TPU, 8) == {
        "all-gather": (96, 96 * gathered * 3 // 4, gathered),
        "reduce-scatter": (96, 96 * reduced * 3 // 4, reduced // 4),
        "all-reduce": (1, 7, 4),
        "collective-permute": (1, 40, 40),
    }


def test_cpu_text_known_trip_counts_branches_and_asynchronous_starts():
    assert sent(CPU, 8) == {
        "all-gather": (1, 64 * 3 // 4, 64),
        "reduce-scatter": (7, 7 * 64 * 3, 64),
    }


def test_groups_over_an_axis_of_permuted_devices():
    assert sent(PERMUTED, 8) == {"all-reduce": (1, 2 * 32 // 2, 32)}
