"""How many cases of a test `make test` runs, where all of them go down the same code path.

The first, the last and those evenly between them; `make test-all` runs every case. A test that is not listed
runs whole: laws of the transforms, golden arrays in float64, and tests of which one case takes no time.
"""

from collections import defaultdict

import pytest

FEW = {
    "test_amp_autocast.py::test_gradients_are_as_close_as_cast_by_hand": 4,
    "test_amp_autocast.py::test_products_are_low_and_sums_are_not": 17,
    "test_blocks.py::test_fused_is_the_block_within_the_bound": 8,
    "test_blocks.py::test_one_and_three_axes": 3,
    "test_blocks.py::test_starts_from_a_convolution": 5,
    "test_checkpoint.py::test_a_damaged_checkpoint_is_noticed_and_the_one_before_used": 3,
    "test_composition.py::test_a_neutral_setting_is_as_if_absent": 1,
    "test_composition.py::test_fused_is_the_branches": 1,
    "test_cyclical.py::test_gradients_are_those_of_the_bounds": 3,
    "test_cyclical.py::test_one_cycle_is_torchs_at_odd_settings": 6,
    "test_deploy.py::test_files_are_the_model_and_need_nothing_of_ours": 1,
    "test_deploy.py::test_mistakes_are_sentences": 1,
    "test_echo.py::test_a_source_that_is_too_short_gets_the_best_distance_there_is": 2,
    "test_echo.py::test_grain_checkpoints": 2,
    "test_echo.py::test_min_distance_says_what_a_short_source_gets": 2,
    "test_echo.py::test_resume_is_exact_at_every_position": 5,
    "test_echo_auto.py::test_a_stream_that_tuned_itself_is_resumed_and_replayed": 1,
    "test_faults.py::test_images_that_break_in_mid_run_are_skipped_on_request": 1,
    "test_faults.py::test_sigterm_in_steps_saves": 1,
    "test_fuse_layers.py::test_every_argument_of_a_normalization": 8,
    "test_fuse_layers.py::test_every_argument_of_every_layer": 24,
    "test_fuse_layers.py::test_extended_normalizations_and_sixteen_bits": 4,
    "test_fuse_layers.py::test_subclasses_are_kept_by_name_and_the_rest_is_fused": 3,
    "test_lab_data.py::test_a_state_goes_on_with_identical_batches": 6,
    "test_lab_folders.py::test_a_record_that_breaks_shifts_no_other": 1,
    "test_lab_pipeline.py::test_every_position_is_one_to_go_on_from": 8,
    "test_laws.py::test_a_state_keeps_its_types_and_is_mapped_by_optax": 24,
    "test_laws_modules.py::test_functional_is_the_module": 5,
    "test_laws_modules.py::test_gradients_under_remat_vmap_and_scan": 5,
    "test_laws_modules.py::test_output_dtype_is_that_of_input_and_parameters": 10,
    "test_linen.py::test_twins": 3,
    "test_linen_fuse.py::test_layers": 3,
    "test_longtail_experts.py::test_golden_dive": 2,
    "test_longtail_experts.py::test_gradients": 2,
    "test_longtail_extremes.py::test_losses_take_every_narrow_integer": 2,
    "test_longtail_extremes.py::test_whatever_takes_labels_takes_every_narrow_integer": 2,
    "test_longtail_more.py::test_a_class_that_is_not_offered_and_a_label_outside": 2,
    "test_longtail_more.py::test_golden_float32": 6,
    "test_longtail_more.py::test_masked_examples_cost_nothing_whatever_they_hold": 3,
    "test_longtail_more.py::test_odd_counts_and_logits_are_finite": 6,
    "test_longtail_more.py::test_soft_labels_are_the_expectation_and_shapes_are_free": 3,
    "test_memopt.py::test_adafactor_equals_mesh": 4,
    "test_memopt_random.py::test_adafactor": 12,
    "test_models.py::test_recomputing_changes_nothing": 1,
    "test_models.py::test_starts_near_chance_and_learns": 1,
    "test_nnx.py::test_fused_within_sixteen_units": 1,
    "test_nnx_carried.py::test_a_training_step_under_jit": 2,
    "test_nnx_carried.py::test_the_model_may_stand_anywhere_and_come_by_name": 2,
    "test_nnx_carried.py::test_updates_and_gradients_are_those_of_the_loss": 3,
    "test_reparam.py::test_fused_convolution_is_a_plain_convolution": 2,
    "test_reparam.py::test_fused_equals_branches": 8,
    "test_reparam.py::test_unfuse_is_the_inverse_of_fuse": 2,
    "test_repvgg.py::test_fused_is_the_block_in_evaluation": 2,
    "test_layer_roles.py::test_scanned_linen_attention_updates_as_its_layers_do": 1,
    "test_layer_roles.py::test_stacked_nnx_attention_updates_as_its_layers_do": 1,
    "test_spmd.py::test_losses_of_a_sharded_batch": 8,
    "test_spmd.py::test_losses_of_sharded_classes": 8,
    "test_spmd.py::test_modules_are_those_of_one_device": 5,
    "test_spmd.py::test_updates_and_state_are_those_of_one_device": 18,
    "test_spmd_lab.py::test_fsdp_splits_state_and_gathers_parameters_once": 1,
    "test_switches.py::test_flags_of_the_call": 16,
    "test_switches.py::test_fuse_finds_the_evaluation_form": 3,
}


def mark(items):
    """Mark what `make test` leaves out as slow; cases that are slow in their own right do not count."""
    cases = defaultdict(list)
    for item in items:
        name = item.nodeid.partition("[")[0].rpartition("/")[2]
        if name in FEW and not item.get_closest_marker("slow"):
            cases[name].append(item)
    for name, same in cases.items():
        count, last = FEW[name], len(same) - 1
        chosen = {round(i * last / max(1, count - 1)) for i in range(count)}
        for i in set(range(len(same))) - chosen:
            same[i].add_marker(pytest.mark.slow)
