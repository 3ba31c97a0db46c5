"""Cases for transformers' tests of all models: tiny models of one family.

transformers' source archive has these tests, but not those of single families that call them. Run
by tests/test_transformers_suite.py, in a folder where `tests` is the archive's.
"""

import os
import unittest

import torch
import transformers
from test_drop_in import FAMILIES, config_of
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

FAMILY = os.environ["MVBERT_FAMILY"]
HEADS = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
    "ForQuestionAnswering", "ForMultipleChoice",
)  # fmt: skip


class Tester:
    """What the tests of all models ask of a family's."""

    batch_size, seq_length, num_choices = 3, 8, 2
    is_training = True

    def __init__(self) -> None:
        config = self.get_config()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(config, name))

    def get_config(self):
        return config_of(FAMILY)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 5) + 5
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class FamilyTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(
        getattr(transformers, FAMILIES[FAMILY] + head)
        for head in HEADS
        if hasattr(transformers, FAMILIES[FAMILY] + head)
    )

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Tester()
