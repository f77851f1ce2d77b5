"""DeepSpeed: one engine, four stages, five optimizers, one cut.

    engine           which of DeepSpeed's classes and attributes are used, and which engines are refused
    piece            Piece: what this rank owns of one parameter; AbstractWeights: how one stage holds its weights
    run              Run: parameters end to end in replicated weights, cut into equal stretches, one for each rank
    replicated       stages 0, 1, 2: every rank has whole low-precision weights; Pieces come from Runs
    partitioned      stage 3: every rank has `ds_tensor`, an equal stretch of each parameter, padded at the end
    tensor_parallel  AutoTP: what of each parameter was there to be divided
    steps            when weights change: the steps of the optimizer that DeepSpeed wraps
    layout           ZeroLayout, which turns Pieces into Shards

[Note: masters]
Trained weights live twice, also in fp32 training: the master that the optimizer steps, and the copy that forward reads.
After `initialize` and after every step the copy is the cast master, so an exchange writes the copy only
(`Shard.working`) and going back is `working.copy_(tensor)`, exact. The exception is stage 0 in fp32, which has no
master: `tensor` is the parameter. Stage 0 in bf16 or fp16 keeps whole masters on every rank; the work is divided all
the same: each rank averages its stretch, 1/N of them. Frozen parameters have no master anywhere.

[Note: masters in files]
With the optimizer offloaded to NVMe, DeepSpeed's `step` reads masters a sub-group at a time, writes them back into the
same file, and keeps nothing of them. That file is mapped: a tensor whose elements are the file's, read from the disk
when an update or a swap reads them, in memory that the system takes back. DeepSpeed's direct writes drop the pages that
they write over, and its direct reads wait for what was written into the mapping. Sub-groups below DeepSpeed's smallest
request (1 MiB) stay in memory.

[Note: places are measured, not looked up]
DeepSpeed's `_hp_mapping` says where a master lies, and it is wrong with `round_robin_gradients` (0.19.8: it counts in
the order of the optimizer, memory is in the reordered one; so do `safe_get_full_fp32_param` and its kin). A parameter's
place in its Run is therefore the distance between data pointers.

[Note: DeepSpeed internals]
A missing one is an `EngineVersionError`. A test holds the code to this list, and the list to the installed DeepSpeed.

    engine     optimizer, module, seq_data_parallel_group, global_steps, checkpoint_engine, mpu
               was_step_applied, zero_optimization_stage  public
    ZeRO 1, 2  bit16_groups  parameters
               bit16_groups_flat  weights
               single_partition_of_fp32_groups  masters
    BF16       bf16_groups, bf16_groups_flat, fp32_groups_flat_partition  stage 1, bf16 with fp32 gradients
    FP16       fp16_groups, fp16_groups_flat, fp32_groups_flat  stage 0 with FusedAdam; masters whole
    unfused    fp16_groups, fp32_groups  stage 0 with any other optimizer; one master tensor for each parameter
    ZeRO 3     fp16_groups, fp16_partitioned_groups_flat, fp32_partitioned_groups_flat, persistent_parameters
               parameter_offload, fwd_pre_hook, empty_partition_cache
    parameter  ds_tensor, ds_id, ds_shape, ds_numel, ds_process_group, ds_status, ds_persist  stage 3
               ds_secondary_tensor  stage 3 with zero_hpz_partition_size
               _hp_mapping  stages 1, 2: only whether it is there: destroy() ends it
    AutoTP     tensor_model_parallel  of a parameter that is cut
               get_model_parallel_rank  of the mpu, which is deepspeed.utils.groups
    optional   ds_autotp_universal_checkpoint_meta  AutoTP, of a parameter: how it is cut; DeepSpeed 0.16.9 has none
               backup_optimizer, using_real_optimizer, offloaded_states  what some releases have, and some engines
               swap_optimizer, _swappable_optimizer_subgroup, optimizer_swapper  masters in files
               swap_params_info, get_swap_paths, numel  the same: of the optimizer_swapper, and of each entry
               has_moe_layers, mp_world_size, zenflow, params_in_nvme_and_cpu, final_location  refused where they are on
               mesh_device, sequence_parallel_size  refused together in stages 0 to 2
               ds_quant_scale, is_deepcompile_active  the same

[Note: gathered copies]
Under stage 3 a forward without backward leaves parameters gathered, and later forwards read those copies, not
`ds_tensor`. `empty_partition_cache` waits for prefetches and frees every copy without writing it back. Parameters below
`stage3_param_persistence_threshold` stay gathered from step to step: `publish` gathers them anew. This is what
DeepSpeed itself does around a checkpoint. With `zero_hpz_partition_size` > 1 forward gathers from a second partition;
`publish` drops it, as a step does.
"""

from __future__ import annotations

from .engine import looks_like_zero
from .layout import ZeroLayout

__all__ = ["ZeroLayout", "looks_like_zero"]
