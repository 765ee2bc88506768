"""What of a batch a model is called on."""

import torch
import transformers

from lightning_distill.models.calling import call_model


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_a_decoder_reads_the_labels_where_it_is_given_nothing_else() -> None:
    model, ids, labels = t5(), torch.arange(6).view(2, 3), torch.arange(8).view(2, 4)
    alone = call_model(model, {"input_ids": ids, "labels": labels})
    read = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], 1)
    beside = call_model(model, {"input_ids": ids, "labels": labels, "decoder_input_ids": read})
    torch.testing.assert_close(alone.logits, beside.logits)
    assert beside.loss is None


def test_labels_are_no_input_of_others() -> None:
    config = transformers.BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.BertForMaskedLM(config)
    ids = torch.arange(6).view(2, 3)
    assert call_model(model, {"input_ids": ids, "labels": ids}).loss is None
