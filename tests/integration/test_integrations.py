"""The libraries around transformers, the real ones: PyTorch's compilers, accelerate, PEFT, sentence-transformers."""

import copy

import onnxruntime
import pytest
import torch
from architectures import TIED, UNTIED, packed
from conftest import VOCABULARY, close, tiny_bert_config
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from tokenizers import Tokenizer, models
from torch.func import functional_call, grad, vmap
from transformers import BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from hf_adacomp import AdaCompCallback, AdaCompConfig, AdaptiveCompressedEmbedding, compress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compiles_as_one_graph(name, counts, ids):
    model = packed(name, counts)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for some in (ids, ids[:1, :5]):  # a head scores few positions in another way
            assert torch.allclose(compiled(input_ids=some).logits, model(some).logits, atol=1e-5)


def test_encoder_exports(config, counts, ids):
    model = pack(compress(BertModel(tiny_bert_config()).eval(), config, counts)).eval()
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=32)}
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": axes})
    for texts in (ids, ids[:2, :5]):
        with torch.no_grad():
            found = program.module()(input_ids=texts).last_hidden_state
            assert torch.allclose(found, model(texts).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3"])
def test_half_precision(name, dtype, counts, ids):
    model = packed(name, counts)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        found = half(ids).logits
        assert found.dtype == dtype
        assert torch.allclose(found.float(), model(ids).logits, atol=0.05)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}])
def test_device_map(options, counts, ids, tmp_path):
    model = packed("gpt2", counts)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **options)
    with torch.no_grad():
        assert close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradient_checkpointing(name, counts, ids):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = packed(name, counts)
        model.config.use_cache = False
        if checkpointing:
            # The name of older releases of transformers is deprecated in newer ones.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().codebook.scale.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.filterwarnings("default::FutureWarning")  # PEFT asks for deprecated names of transformers
def test_lora_on_a_packed_model(counts, ids, tmp_path):
    packed("gpt2", counts).save_pretrained(tmp_path / "packed")
    load = type(TIED["gpt2"]()).from_pretrained
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(load(tmp_path / "packed"), settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert close(loaded(input_ids=ids).logits, expected)
        assert not torch.allclose(load(tmp_path / "packed")(ids).logits, expected, atol=1e-2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2 * VOCABULARY * 32


def adapted(model, ids, **settings):
    """`model` with adapters of PEFT, trained by three steps."""
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **settings)).train()
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return adapter.eval()


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_table_that_peft_trains_a_copy_of_is_read_by_the_head(counts, ids, tmp_path):
    model = packed("llama-tied", counts)
    before = model(ids).logits
    adapter = adapted(model, ids, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    expected = adapter(ids).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"modules_to_save.default is an adapter's copy .* merge_and_unload\(\)"):
        adapter.base_model.model.save_pretrained(tmp_path)
    merged = adapter.merge_and_unload()
    assert merged.lm_head.embedding is merged.get_input_embeddings()
    assert close(merged(ids).logits, expected)
    merged.save_pretrained(tmp_path)
    assert close(type(merged).from_pretrained(tmp_path)(ids).logits, expected)


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_lora_on_the_table_itself(counts, ids):
    model = packed("llama-tied", counts)
    adapter = adapted(model, ids, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"would write.*decompress"):
        adapter.merge_and_unload()


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_deltas_of_single_tokens(counts, ids):
    untied = pack(compress(UNTIED["llama"](), AdaCompConfig((4, 8, 32), target_ratio=3), counts))
    before = untied(ids).logits
    adapter = adapted(untied, ids, target_modules=["q_proj"], trainable_token_indices=[int(ids[0, 0])])
    assert not torch.allclose(adapter(ids).logits, before, atol=1e-3)
    with pytest.raises(ValueError, match=r"TrainableTokensWrapper now.*decompress.*add_tokens"):
        adapted(packed("llama-tied", counts), ids, target_modules=["q_proj"], trainable_token_indices=[5])


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_prompt_tuning(counts, ids, tmp_path):
    model = packed("llama-tied", counts)
    adapter = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapter(input_ids=ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None for parameter in adapter.parameters())
    bert = packed("bert", counts)
    assert bert.bert.get_submodule("embeddings.word_embeddings") is bert.get_input_embeddings()
    with pytest.raises(AttributeError):
        bert.get_submodule("no.such.module")


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_auto_peft_model_resizes_what_it_loads(counts, ids, tmp_path):
    packed("llama-tied", counts).save_pretrained(tmp_path / "base")
    base = type(TIED["llama-tied"]()).from_pretrained(tmp_path / "base")
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(base, settings).save_pretrained(tmp_path / "a")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY + 3)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.get_input_embeddings().num_embeddings == len(tokenizer) > VOCABULARY
    assert loaded(ids).logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_graphs_check_ids_as_upstream(counts, ids, bad):
    table = packed("bert", counts).get_input_embeddings()
    wrong = ids.clone()
    wrong[0, 0] = bad
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(table, (ids,)).module()
    for run in (compiled, exported):
        assert close(run(ids), table(ids))
        with pytest.raises(RuntimeError, match="out of range"):
            run(wrong)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradients_of_single_examples(name, counts, ids):
    """By `torch.func.vmap`, as differentially private training takes them."""
    model = packed(name, counts)
    model.set_attn_implementation("eager")
    learning = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, example):
        return functional_call(model, parameters, (example[None],)).logits.logsumexp(-1).sum()

    found = vmap(grad(loss), (None, 0))(learning, ids)
    for i, example in enumerate(ids):
        one = torch.cat([gradients[i].flatten() for gradients in found.values()])
        assert close(one, torch.cat([gradient.flatten() for gradient in grad(loss)(learning, example).values()]), 1e-4)
    for beyond in (VOCABULARY, -VOCABULARY):
        with pytest.raises(RuntimeError, match="token id out of range"):
            vmap(grad(loss), (None, 0))(learning, ids + beyond)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradients_by_torch_func(name, training, counts):
    model = packed(name, counts).train(training)
    learning = {key: p.detach() for key, p in model.named_parameters()}
    ids = torch.randint(0, VOCABULARY, (2, 20))  # as many positions as a head scores by blocks

    def loss(parameters):
        torch.manual_seed(0)  # of dropout
        return functional_call(model, parameters, (ids,)).logits.logsumexp(-1).sum()

    found = grad(loss)(learning)
    loss({}).backward()
    for key, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert close(found[key], expected, 1e-4), key


def test_functional_calls_take_the_state_dict(counts, ids):
    model, other = packed("gpt2", counts), packed("gpt2", counts.flip(0))
    logits = functional_call(other, model.state_dict(), (ids,)).logits
    assert logits.shape == model(ids).logits.shape
    assert other.lm_head.weight is other.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traces_for_any_shape(counts, ids):
    table = packed("bert", counts).get_input_embeddings()
    traced = torch.jit.trace(table, (ids,))
    other = torch.randint(0, VOCABULARY, (3, 11))
    assert close(traced(other), table(other))


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec:FutureWarning")  # of PyTorch about itself
@pytest.mark.parametrize("lengths", [(4, 8, 32), (5, 11, 32)])
@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM])
def test_exports_to_onnx_without_code_of_ours(model_class, lengths, counts, ids, tmp_path):
    model = pack(
        compress(model_class(tiny_bert_config()).eval(), AdaCompConfig(lengths, target_ratio=3), counts)
    ).eval()
    axes = {"input_ids": {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}}
    inputs = {"input_ids": ids}
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (), kwargs=inputs, dynamic_shapes=axes, f=file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    for texts in (ids, ids[:1, :3], torch.randint(0, VOCABULARY, (5, 11))):
        found = session.run(None, {session.get_inputs()[0].name: texts.numpy()})[0]
        assert close(torch.from_numpy(found), model(texts)[0].detach(), 1e-5)


def test_compresses_and_packs_in_inference_mode(counts, ids):
    with torch.inference_mode():
        model = compress(TIED["bert"](), AdaCompConfig((4, 8, 32), target_ratio=3), counts).eval()
        expected = model(ids).logits
        assert close(pack(model)(ids).logits, expected)
    assert all(not parameter.is_inference() for parameter in model.get_input_embeddings().parameters())


def test_without_values_lengths_must_be_given(config):
    with pytest.raises(ValueError, match=r"meta device.*code_lengths"):
        AdaptiveCompressedEmbedding(1000, 64, AdaCompConfig(), device="meta")
    assert AdaptiveCompressedEmbedding(1000, 64, config, device="meta").phase == "observe"


@pytest.mark.usefixtures("quick_fit")
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")  # not ours
def test_sentence_transformer_trains_saves_and_loads(minilm, tmp_path):
    model = SentenceTransformer(minilm, device="cpu")
    encoder = model[0].auto_model
    compress(encoder, AdaCompConfig(target_ratio=40))
    texts = [f"A man is {verb} a {noun}." for verb in ("eating", "riding") for noun in ("horse", "pizza", "piano")]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=3, report_to="none", save_strategy="no"
        ),
        train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[AdaCompCallback()],
    )
    trainer.train()
    assert encoder.get_input_embeddings().phase == "packed"
    model.save_pretrained(str(tmp_path / "packed"))
    loaded = SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert close(loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True))
