"""How large a student is that flags describe."""

from typing import Any

import pytest
import transformers

from lightning_distill import cli, student_from_teacher
from lightning_distill.data import TextClassificationData


@pytest.mark.parametrize(
    ("flags", "depths"),
    [
        ([], (2, 1)),
        (["--model.num_decoder_layers=1"], (4, 1)),
        (["--model.num_layers=1", "--model.num_decoder_layers=2"], (1, 2)),
        (["--model.width=0.5"], (4, 3)),
    ],
)
def test_an_encoder_decoder_has_two_depths(flags: list[str], depths: tuple[int, int]) -> None:
    sizes: dict[str, Any] = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "vocab_size": 9}
    config = transformers.T5Config(num_layers=4, num_decoder_layers=3, **sizes)
    teacher = transformers.T5ForConditionalGeneration(config)
    parser = cli.task_parser("A recipe.", output_dir="runs/mine", data=TextClassificationData)
    student: Any = student_from_teacher(teacher, **cli.student_size(parser.parse_args(flags), teacher))
    assert (student.config.num_layers, student.config.num_decoder_layers) == depths
