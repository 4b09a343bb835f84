import numpy as np
import pytest
import torch

from padd_ds.data.batches import batch_indices, packed_batch, prompt_batch, supervised_batch, text_windows
from padd_ds.errors import UserError
from tests.data.characters import character_tokenizer


@pytest.mark.parametrize(("batch_size", "n_rows"), [(4, 10), (10, 10), (3, 7), (5, 2), (1, 1)])
def test_every_row_comes_once_per_epoch_across_batch_borders(batch_size, n_rows):
    steps = 3 * n_rows
    stream = [row for step in range(steps) for row in batch_indices(step, batch_size, n_rows, seed=1)]
    assert len(stream) == steps * batch_size
    for start in range(0, len(stream) - n_rows + 1, n_rows):
        assert sorted(stream[start : start + n_rows]) == list(range(n_rows))


def test_batches_depend_on_nothing_but_the_arguments():
    assert batch_indices(17, 8, 100, seed=3) == batch_indices(17, 8, 100, seed=3)
    assert batch_indices(17, 8, 100, seed=3) != batch_indices(17, 8, 100, seed=4)
    assert batch_indices(0, 100, 100, seed=3) != batch_indices(1, 100, 100, seed=3)


def test_target_mask_covers_the_target_and_its_end_token_only():
    tokenizer = character_tokenizer()
    batch = supervised_batch(["ab", "a"], ["c", "cde"], tokenizer, max_length=20)
    assert batch["attention_mask_BT"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["target_mask_BR"].tolist() == [[False, False, True, True], [True, True, True, True]]
    learnt = [ids[mask] for ids, mask in zip(batch["target_ids_BR"], batch["target_mask_BR"], strict=True)]
    assert [tokenizer.decode(ids) for ids in learnt] == ["c<eos>", "cde<eos>"]
    assert torch.equal(batch["target_ids_BR"], batch["input_ids_BT"][:, 1:])
    assert batch["truncated"] == 0


def test_long_rows_are_cut_and_counted():
    batch = supervised_batch(["ab", "abcdef", "a"], ["cdef", "g", "b"], character_tokenizer(), max_length=4)
    assert batch["input_ids_BT"].shape == (3, 4)
    assert batch["target_mask_BR"].tolist() == [[True, True], [False, False], [True, True]]
    assert batch["truncated"] == 2


def test_batch_without_room_for_any_target_learns_nothing():
    batch = supervised_batch(["abcd", "efgh"], ["i", "j"], character_tokenizer(), max_length=4)
    assert batch["target_mask_BR"].tolist() == [[False], [False]]


def test_prompt_without_a_token_is_refused():
    with pytest.raises(UserError, match=r"data\.template"):
        supervised_batch(["ab", ""], ["c", "d"], character_tokenizer(), max_length=4)


def test_supervised_row_of_exactly_the_limit_is_not_cut():
    assert supervised_batch(["ab"], ["c"], character_tokenizer(), max_length=4)["truncated"] == 0


def test_prompts_are_padded_on_the_left_and_keep_their_end():
    tokenizer = character_tokenizer()
    batch = prompt_batch(["abc", "d", "12345"], tokenizer, max_prompt_length=4)
    texts = [tokenizer.decode(ids) for ids in batch["input_ids_BT"]]
    assert texts == ["<pad>abc", "<pad><pad><pad>d", "2345"]
    assert torch.equal(batch["attention_mask_BT"], (batch["input_ids_BT"] != tokenizer.pad_token_id).long())
    assert batch["truncated"] == 1


def test_text_windows_follow_each_other_without_overlap():
    tokenizer = character_tokenizer(bos=True)
    windows_NT = text_windows("abcdefgh", tokenizer, length=3)
    assert [tokenizer.decode(ids) for ids in windows_NT] == ["abc", "def"]
    assert text_windows("abcdefgh", tokenizer, length=3, count=1).shape == (1, 3)
    with pytest.raises(UserError, match="8 tokens, less than one window of 9"):
        text_windows("abcdefgh", tokenizer, length=9)


def test_packed_rows_by_hand():
    rows = [[np.array([5, 6, 7]), np.array([8, 9])], [np.array([4, 3])]]
    batch = packed_batch(rows, pad_token_id=0)
    assert batch["input_ids_BT"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["attention_mask_BT"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["position_ids_BT"] is not None
    assert batch["position_ids_BT"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["target_ids_BR"].tolist() == [[6, 7, 8, 9], [3, 0, 0, 0]]
    # Never the first token of a document, 8 here, and no padding.
    assert batch["target_mask_BR"].tolist() == [[True, True, False, True], [True, False, False, False]]
