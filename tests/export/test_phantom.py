"""The phantom's training parts against their definitions, and the shipped checkpoint against held-out phantoms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from healthgpt_edge import phantoms
from healthgpt_edge.export.checkpoint import Checkpoint
from healthgpt_edge.export.phantom import autoencoder, base, corpus, measure, pictures, plugins
from healthgpt_edge.export.phantom.release import released_files
from healthgpt_edge.export.phantom.train import Steps, Training
from healthgpt_edge.export.reference.language import rotary_tables, rotate
from healthgpt_edge.export.reference.model import HealthGPT
from healthgpt_edge.export.tokenizer import write_tokenizer
from healthgpt_edge.prompt import Tokenizer, prompt_ids

PHANTOM = Path(__file__).parents[2] / "phantom"


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with Checkpoint.open(**released_files(PHANTOM)) as opened:
        yield opened


@pytest.fixture(scope="module")
def words() -> corpus.Words:
    return corpus.Words(PHANTOM / "base")


def test_answers_are_far_above_chance(checkpoint: Checkpoint, words: corpus.Words) -> None:
    scores = measure.answers(HealthGPT.load(checkpoint, "comprehension"), words, 20)
    assert scores["modality"]["accuracy"] >= 0.95 > scores["modality"]["chance"]
    assert scores["lesion"]["accuracy"] >= 0.85 > scores["lesion"]["chance"]
    assert scores["count"]["accuracy"] >= scores["count"]["chance"] + 0.2
    assert scores["where"]["accuracy"] >= scores["where"]["chance"] + 0.3


def test_pictures_beat_the_trivial_answer(checkpoint: Checkpoint, words: corpus.Words) -> None:
    model = HealthGPT.load(checkpoint, "generation")
    scores = measure.pictures(model, model.vqgan, words, 4)
    assert scores["valid_free_runs"] >= 0.8
    for kind in ("reconstruct", "ct-to-mr"):
        assert scores[kind]["psnr"] >= scores[kind]["baseline_psnr"] + 3
        assert scores[kind]["ssim"] > scores[kind]["baseline_ssim"]


def test_drawings_from_words_show_the_modality_that_was_asked_for(checkpoint: Checkpoint, words: corpus.Words) -> None:
    answering, drawing = (HealthGPT.load(checkpoint, task) for task in ("comprehension", "generation"))
    scores = measure.drawings(answering, drawing, drawing.vqgan, words, 10)
    assert scores["modality"]["accuracy"] >= 0.95 > scores["modality"]["chance"]


def test_the_codebook_is_used(checkpoint: Checkpoint) -> None:
    model = HealthGPT.load(checkpoint, "generation").vqgan
    sample = phantoms.held_out(4)
    codes = model.encode(autoencoder.to_input(np.stack([p for one in sample for p in (one.ct, one.mr)])))
    assert codes.shape == (8, 16, 16)
    assert len(codes.unique()) > 64


def test_shipped_figures_and_size() -> None:
    metrics = json.loads((PHANTOM / "metrics.json").read_text())
    assert metrics["held_out_phantoms"] >= 100
    assert set(metrics["answers"]) == set(metrics["drawings"]) == set(phantoms.QUESTIONS)
    assert sum(path.stat().st_size for path in PHANTOM.rglob("*") if path.is_file()) < 15_000_000


def test_instructions_share_one_length(words: corpus.Words) -> None:
    assert len({len(prompt) for prompt in words.instructions().values()}) == 1


def test_findings_agree_with_their_answers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        seen, answers = corpus.findings(rng)
        assert f"is {answers['modality']}." in seen
        assert ("no lesion" in seen) == (answers["lesion"] == "No") == (answers["count"] == "None")
        assert ("where" in answers) == (answers["count"] == "One")
        assert sum(seen.count(place) for place in phantoms.QUADRANTS) == phantoms.COUNT_WORDS.index(answers["count"])


def test_copy_batch_places_the_copy_at_the_copy_distance(words: corpus.Words) -> None:
    inputs, labels = base.copy_batch(words, np.random.default_rng(0))
    distance = base.copy_distance(words)
    at = torch.arange(inputs.shape[1])[-base.CODES - 1 : -1]  # the positions that predict the copy
    assert torch.equal(labels[:, at], inputs[:, at - distance])
    assert (labels[:, -1] == corpus.END).all()
    assert (labels[:, : at[0]] == base.IGNORED).all()


def test_copy_heads_attend_to_the_copy_distance() -> None:
    torch.manual_seed(0)
    model = base.new_model()
    base.place_copy_heads(model, 264)
    attention = model.model.layers[0].self_attn
    normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.randint(3, 400, (1, 400))))
    query, key, _ = attention.project(normed)
    tables = rotary_tables(base.LANGUAGE, torch.arange(400))
    query, key = rotate(query, tables)[0, 0], rotate(key, tables)[0, 0]
    scores = query[-1] @ key.T * base.LANGUAGE.head_dim**-0.5
    assert int(scores.argmax()) == 399 - 264
    assert float(scores.detach().softmax(dim=0).max()) > 0.5


def test_branches_equal_separate_continuations(checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    model = HealthGPT.load(checkpoint, "comprehension")
    prefix, branches = torch.randn(2, 7, 128), torch.randn(2, 3, 5, 128)
    together = plugins.branch(model, prefix, branches)
    for index in range(3):
        alone = model.model(torch.cat([prefix, branches[:, index]], dim=1))[:, 7:]
        torch.testing.assert_close(together[:, index], alone, atol=1e-4, rtol=1e-4)


def test_prompt_embeddings_equal_the_reference(checkpoint: Checkpoint, words: corpus.Words) -> None:
    model = HealthGPT.load(checkpoint, "generation")
    prompt = [*words.prompt("Translate to MR."), plugins.NEW_TOKENS.start]
    shown = model.vision_tower.normalise(pictures.enlarge([phantoms.phantom(0).ct]))
    expected = model.embed(prompt, model.features(shown))
    given = plugins.prompt_embeddings(model, torch.tensor([prompt]), model.image_features(shown))
    torch.testing.assert_close(given, expected)


def test_batched_greedy_equals_the_reference(checkpoint: Checkpoint, words: corpus.Words) -> None:
    model = HealthGPT.load(checkpoint, "comprehension")
    sample = [phantoms.phantom(seed).mr for seed in (0, 1, 2)]
    prompt = words.prompt(phantoms.QUESTIONS["count"])
    together = measure.greedy(model, torch.tensor([prompt] * 3), sample, 3).tolist()
    for picture, row in zip(sample, together, strict=True):
        shown = model.vision_tower.normalise(pictures.enlarge([picture]))
        alone = model.generate(prompt, shown, 3)
        assert row[: len(alone)] == alone


def test_examples_pair_prompts_with_their_codes(checkpoint: Checkpoint, words: corpus.Words) -> None:
    model = HealthGPT.load(checkpoint, "generation")
    subjects = phantoms.held_out(6)
    codes = torch.arange(12).reshape(6, 2, 1).expand(6, 2, 256)  # of each picture its number
    examples = plugins._Examples(np.random.default_rng(0), model, words, subjects, codes)
    described = [drawing.instruction for subject in subjects for drawing in phantoms.drawings(subject)]
    ids = [[*words.without_picture(text), plugins.NEW_TOKENS.start] for text in described]
    lengths = set()
    for _ in range(20):
        prompts, wanted = examples.from_words()
        assert wanted.shape == (plugins.PICTURE_BATCH, 256)
        for prompt, number in zip(prompts, wanted[:, 0].tolist(), strict=True):
            assert torch.equal(prompt, model.model.embed_tokens(torch.tensor(ids[number])))
        lengths.add(prompts.shape[1])
    assert len(lengths) > 1
    prompts, wanted = examples.from_pictures()
    assert prompts.shape[1] == len(words.instructions()["reconstruct"]) + 256
    assert len(wanted) == plugins.PICTURE_BATCH


def test_prompts_of_training_are_those_of_the_runtime(words: corpus.Words, tmp_path: Path) -> None:
    text, options = write_tokenizer(PHANTOM / "base", plugins.NEW_TOKENS.codes)
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", options)
    text = phantoms.Drawing("MR", ("upper left", "lower right")).instruction
    trained = [*words.without_picture(text), plugins.NEW_TOKENS.start]
    assert trained == prompt_ids(tokenizer, "phi3", text, image=False, generation=True)


def test_training_rows_move_new_tokens_only(words: corpus.Words) -> None:
    torch.manual_seed(0)
    model = plugins.new_plugin(
        plugins.GENERATION_TASK, base.new_model().state_dict(), base.new_model().vision_tower.state_dict()
    )
    ids = torch.tensor([[5, plugins.NEW_TOKENS.first_code, plugins.NEW_TOKENS.end]])
    model(model.model.embed_tokens(ids)).sum().backward()
    moved = model.model.embed_tokens.weight.grad.abs().sum(dim=1)
    assert moved[: corpus.TOKENS].sum() == 0
    assert moved[plugins.NEW_TOKENS.first_code] > 0
    assert model.model.layers[0].self_attn.qkv_proj.weight.grad is None


def test_moving_codebook_finds_clusters_and_revives_rows() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 10.0], [10.0, 0.0], [-10.0, 0.0]])
    latents = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 2)
    codebook = autoencoder.MovingCodebook(latents, 3)
    for _ in range(300):
        codebook.update(latents, codebook.choose(latents))
        codebook.revive(latents)
    found = torch.cdist(centres, codebook.rows).min(dim=1).values
    assert float(found.max()) < 0.5


def test_patch_windows_are_the_patch_and_its_surroundings() -> None:
    subject = phantoms.phantom(0)
    windows = (pictures.patch_windows([subject.mr])[0].unflatten(1, (16, 16)) + 1) * 127.5
    assert np.allclose(windows[17], subject.mr[4:20, 4:20], atol=1e-3)
    assert np.allclose(windows[0][4:, 4:], subject.mr[:12, :12], atol=1e-3)
    assert float(windows[0][:4].abs().max()) < 1e-3


def test_lesion_map_marks_each_centre() -> None:
    for seed in range(20):
        subject = phantoms.phantom(seed)
        marked = pictures.lesion_map(subject).reshape(16, 16)
        assert marked.sum() == len(subject.lesions)
        for lesion in subject.lesions:
            assert marked[int(lesion.row // 8), int(lesion.column // 8)] == 1


def test_a_stage_that_is_cut_off_while_it_is_kept_is_trained_again(tmp_path: Path, monkeypatch) -> None:
    training = Training(tmp_path, 0, Steps(phantoms=1))

    def save_half(content, file) -> None:
        write = file.write_bytes if isinstance(file, Path) else file.write
        write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", save_half)
        training.stage("vqgan", lambda: {"weight": torch.zeros(2)})
    assert list((tmp_path / "work").iterdir()) == []
    assert training.stage("vqgan", lambda: {"weight": torch.ones(2)})["weight"].tolist() == [1, 1]
    assert training.spent("seconds") == {"vqgan": 0}


def test_too_few_steps_for_a_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "WARM_UP_STEPS", 3)
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    with pytest.raises(ValueError, match=r"^expected more than 3 steps, got 1$"):
        autoencoder.train(0, 1, lambda line: None)


def test_words_of_another_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TOKENS", corpus.TOKENS + 1)
    with pytest.raises(ValueError, match=f"^expected a tokenizer of {corpus.TOKENS} tokens, got {corpus.TOKENS - 1}$"):
        corpus.Words(PHANTOM / "base")


def test_instructions_of_several_lengths_are_refused(words: corpus.Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(phantoms.INSTRUCTIONS, "reconstruct", "Reconstruct the image. Reconstruct the image.")
    with pytest.raises(ValueError, match=r"^expected instructions of one length in tokens, got \{"):
        words.instructions()
