"""What the rollout benchmark makes of the seconds that it measured; a run of it is what `make bench-rollout` does."""

from tools.bench_rollout import command_line, table


def test_each_engine_is_compared_turn_by_turn_with_its_own_library() -> None:
    seconds = {
        "transformers' generate": [4.0, 2.0],
        "engine hf": [2.0, 1.0],
        "vllm.LLM": [1.0, 1.0],
        "engine vllm": [2.0, 2.0],
    }
    rows = dict(line.strip("| ").split(" | ", 1) for line in table(seconds, tokens=60).splitlines()[2:])
    assert rows["engine hf"] == "40 | 2.00 (2.00 to 2.00)"
    assert rows["engine vllm"] == "30 | 0.50 (0.50 to 0.50)"
    assert rows["transformers' generate"] == "20 | 1" and rows["vllm.LLM"] == "60 | 1"


def test_the_server_is_told_the_options_that_raw_vllm_takes() -> None:
    options = {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "compilation_config": {"mode": 0},
    }
    words = [
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--max-num-seqs",
        "4",
        "--compilation-config",
        '{"mode": 0}',
    ]
    assert command_line(options) == words
