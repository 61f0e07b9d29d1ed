"""libtorch's operations in place of kernels: they serve CUDA unless TLLIB_RS_CUDA=1. They pass the methods'
own tests, here on the CPU."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.again import begun, passes_again

#: For each method, the longest first, the tests to leave out, which are about a kernel or about the CPU: digits that the plain
#: formulation loses too; products of another layout, summed in another order and rounded to a half type, or in
#: a backward pass inside an autocast region; values that the host would have to wait for; a fork, which libtorch's
#: OpenMP threads do not survive.
EXCEPT = {
    "compiled_losses": "wrong_types",
    "losses": "(changed_before_create_graph and pi_model_mask) or (layouts and float16 and (triplet or pairwise))"
    " or (test_autocast and pairwise)",
    "distributed_losses": "killed or bad_input",
    "cc_loss": "through_and_around",
    "dst": "",
    "entropy": "",
    "mcc": "certain_rows_keep",
    "pi_model": "",
    "pseudo_label": "",
    # Half types are converted, and nothing needs them after that.
    "reid_loss": "near_duplicates or one_product_serves or (bad_input and IndexError) or half_types_notice"
    " or labels_are_checked or read_where_it_is or both_layouts",
    "self_ensemble": "large_batch or mean_above_1 or bad_probabilities",
    "uda": "",
    "flexmatch": "bad_update or bad_get_threshold or hundred_million or fork_while or made_in_a_dispatch_mode",
    "self_tuning": "strides_and_autocast or writes_between or bad_batches or bad_queues or labels_are_checked",
    "compile": "refuses_before_anything_changes",
    "compiled_training": "",
    "training": "",
    "mean_teacher": "",
    "mean_teacher_state": "",
    "on_device": "",
    "self_ensemble_on_device": "",
    "mcc_on_device": "",
    "reid_loss_on_device": "",
    "self_tuning_on_device": "",
    "states_on_device": "",
}


@pytest.fixture(scope="module")
def through_operations(request):
    def run(stem):
        which = f"not ({EXCEPT[stem]})" if EXCEPT[stem] else ""
        passes_again([f"test_{stem}.py"], which, {"TLLIB_RS_COMPOSITE": "1"})

    yield from begun(request, run)


@pytest.mark.parametrize("stem", EXCEPT)
def test_operations_pass_the_tests_of_kernels(stem, through_operations):
    through_operations[stem].result()


def test_they_serve_where_they_are_asked_for():
    kernel, operations = (logarithms({"TLLIB_RS_COMPOSITE": asked}) for asked in "01")
    assert (kernel, operations) == (0, 1)


def logarithms(environment):
    """How many logarithms torch computes in a training step of entropy, in a process with ``environment``."""
    code = """
        import torch
        from tllib_rs.modules.entropy import entropy

        p = torch.rand(2, 3, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            entropy(p).sum().backward()
        print([event.name for event in recorded.events()].count("aten::log"))
    """
    return int(
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
