"""A dialogue that computes only what is new, against the library's own forward pass over all of it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from interlace.data.media import open_images
from interlace.data.sample import Image, Text, Turn, media_of
from interlace.errors import InputError
from interlace.inference.context import can_go_on
from interlace.inference.dialogue import Dialogue
from interlace.inference.generation import Generator, load_generator
from interlace.inference.sampling import Sampling
from interlace.model.attention import window_of
from tests import small_families, test_families
from tests.conftest import DEMO_MODEL

FAMILIES = ("llava", "llava_next", "llava_onevision", *small_families.SMALL)
SIZES = ((90, 30), (20, 75), (40, 40), (100, 95), (33, 60))
IMAGE_TURNS = (0, 1, 1, 4, 6, 7, 7, 7, 12, 17)  # the turns that the ten images are attached to
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("ten pictures")
    for number in range(10):
        width, height = SIZES[number % len(SIZES)]
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(10)]


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Generator]:
    made: dict[str, Generator] = {}

    def generator(family: str) -> Generator:
        if family not in made:
            make = small_families.make_model if family in small_families.SMALL else test_families.make_model
            path = "demo" if family == "llava" else str(make(family, tmp_path_factory.mktemp(family)))
            made[family] = load_generator(path, "float32")
            # random models would say image tokens, which the library takes for images
            made[family].model.get_output_embeddings().weight.data[made[family].processing.config.image_token_id] = 0
        return made[family]

    return generator


@dataclass
class Counted:
    """What went through a model: the logits of each answer's tokens, tokens through the language model, rows of pixels through the tower."""

    logits: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    pixels: int = 0


@contextmanager
def counting(dialogue: Dialogue) -> Iterator[Counted]:
    counted, context = Counted(), dialogue.context
    language_model, tower = (getattr(context.model.model, name) for name in (context.family.language_model, context.family.vision_tower))

    def count_tokens(_: Any, __: Any, named: dict[str, Any]) -> None:
        counted.tokens += named["inputs_embeds"].shape[1]

    def count_pixels(_: Any, inputs: Sequence[torch.Tensor], named: dict[str, Any]) -> None:
        counted.pixels += len(inputs[0] if inputs else named["pixel_values"])

    hooks = [
        language_model.register_forward_pre_hook(count_tokens, with_kwargs=True),
        tower.register_forward_pre_hook(count_pixels, with_kwargs=True),
        context.model.get_output_embeddings().register_forward_hook(lambda _, __, output: counted.logits.append(output[0].detach().clone())),
    ]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def whole_log_probs(generator: Generator, turns: Sequence[Turn], answer: Sequence[int], model: Any = None) -> torch.Tensor:
    """(answer + 1, vocabulary) by transformers' forward over the whole conversation and all its images, without a cache."""
    prompt = generator.prompt(turns)
    ids = torch.tensor([[*prompt.input_ids, *answer]])
    vision = generator.processing.generation_inputs([open_images(prompt.images)], ids)
    logits = (model or generator.model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **vision).logits[0, len(prompt.input_ids) - 1 :]
    return F.log_softmax(logits.float(), -1)


def assert_exact(dialogue: Dialogue, question: str, model: Any = None) -> tuple[Counted, int]:
    """Asks, and holds each token's log-probs against the whole conversation; what it cost, and the length of the prompt."""
    system = [Turn("system", (Text(dialogue.system),))] if dialogue.system else []
    with counting(dialogue) as counted:
        dialogue.ask(question)
    turns, logits = [*system, *dialogue.turns[:-1]], torch.stack(counted.logits)
    expected = whole_log_probs(dialogue.generator, turns, logits.argmax(-1).tolist()[:-1], model)
    torch.testing.assert_close(F.log_softmax(logits, -1), expected, **TOLERANCE)
    return counted, len(dialogue.generator.prompt(turns).input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_turns_with_ten_images_equal_a_full_encoding_at_a_fifth_of_the_cost(
    family: str, generators: Callable[[str], Generator], pictures: list[str]
) -> None:
    generator = generators(family)
    dialogue, processing = Dialogue(generator, 4), generator.processing
    costs, lengths, num_pixels, tiles_of = [], [], 0, {}
    full_pixels = 0
    for turn in range(20):
        dialogue.attach([path for path, at in zip(pictures, IMAGE_TURNS, strict=True) if at == turn])
        counted, length = assert_exact(dialogue, f"What about {turn}, then?")
        costs.append(counted.tokens)
        lengths.append(length + len(counted.logits) - 1)
        num_pixels += counted.pixels
        images = [PIL.Image.open(item.path).convert("RGB") for item in media_of(dialogue.turns)]
        for number, (image, tokens) in enumerate(zip(images, processing.row_image_tokens([image.size for image in images]), strict=True)):
            if (number, tokens) not in tiles_of:
                tiles_of[number, tokens] = len(processing.process_images([image], [tokens]).flatten(0, 1 if processing.images.has_grids else 0))
            full_pixels += tiles_of[number, tokens]
    assert len(tiles_of) == (11 if family == "llava_onevision" else 10)  # which cuts an image only as long as it is alone
    assert num_pixels == sum(tiles_of.values())
    assert full_pixels >= 5 * num_pixels
    assert sum(lengths) >= 5 * sum(costs)
    assert lengths[-1] >= 5 * costs[-1]
    assert costs[19] <= costs[2] + 12  # a turn without images costs no more for what came before it


# --- what makes a cache wrong ---


def test_answers_are_those_of_generate_and_repeat_them_where_it_penalises(generators: Callable[[str], Generator], pictures: list[str]) -> None:
    generator = generators("qwen2_5_vl")
    for penalty in (1.0, 1.7):
        dialogue = Dialogue(generator, Sampling(12, repetition_penalty=penalty))
        dialogue.attach(pictures[:2])
        answer = dialogue.ask("What?")
        prompt = generator.prompt(dialogue.turns[:-1])
        ids = torch.tensor([prompt.input_ids])
        vision = generator.processing.generation_inputs([open_images(prompt.images)], ids)
        output = generator.model.generate(  # type: ignore[operator]
            input_ids=ids, **vision, do_sample=False, max_new_tokens=12, repetition_penalty=penalty, eos_token_id=generator.processing.template.end
        )
        assert answer == generator.processing.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_two_dialogues_may_share_a_model_whose_positions_have_rows_and_columns(generators: Callable[[str], Generator], pictures: list[str]) -> None:
    first, second = (Dialogue(generators("qwen2_vl"), 4) for _ in range(2))
    for turn in range(4):
        first.attach(pictures[turn : turn + 1])
        second.attach(pictures[4 - turn : 6])
        for dialogue in (first, second):
            assert_exact(dialogue, f"And {turn}?")


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl"])
def test_what_is_taken_back_is_forgotten_and_its_images_are_kept(family: str, generators: Callable[[str], Generator], pictures: list[str]) -> None:
    dialogue = Dialogue(generators(family), 4)
    dialogue.attach(pictures[:2])
    assert_exact(dialogue, "Which?")
    dialogue.attach(pictures[2:4])
    assert_exact(dialogue, "Which of <image> and <image>?")
    before = list(dialogue.turns)
    question = dialogue.undo()
    assert len(dialogue.turns) == len(dialogue.frames) == 2
    with counting(dialogue) as counted:
        assert dialogue.ask(question) == before[-1].text  # greedy: the same once more
    assert (counted.pixels, dialogue.turns) == (0, before)
    with counting(dialogue) as counted:
        again = "".join(dialogue.retry())
    assert (again, counted.pixels, dialogue.turns) == (before[-1].text, 0, before)
    assert counted.tokens == len(counted.logits)  # all but the last token of the question was there
    dialogue.undo()
    dialogue.attach([pictures[3], pictures[2]])  # as many tokens, other images
    assert assert_exact(dialogue, "Which of <image> and <image>?")[0].pixels == 0
    dialogue.drop_oldest(1)
    dialogue.set_system("Answer in one word.")
    assert assert_exact(dialogue, "And?")[0].pixels == 0


def test_an_answer_that_is_spelt_otherwise_once_it_is_text_is_read_again(generators: Callable[[str], Generator]) -> None:
    dialogue = Dialogue(generators("qwen2_vl"), 8)
    others = 0
    for turn in range(6):
        read = list(dialogue.context.tokens)
        assert_exact(dialogue, f"Say {turn}")
        others += dialogue.context.tokens[: len(read)] != read
    assert others  # a random model says such things


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_adapter_and_the_model_under_it_are_told_apart(family: str, generators: Callable[[str], Generator], pictures: list[str], tmp_path: Path) -> None:
    path = "demo" if family == "llava" else str(small_families.make_model(family, tmp_path))
    plain = load_generator(path, "float32")
    plain.model.get_output_embeddings().weight.data[plain.processing.config.image_token_id] = 0
    base = load_generator(path, "float32")
    base.model.get_output_embeddings().weight.data[plain.processing.config.image_token_id] = 0
    whole = ["multi_modal_projector", "vision_tower"] if family == "llava" else ["merger"]
    adapted = get_peft_model(base.model, LoraConfig(r=4, target_modules=r".*language_model.*\.[qv]_proj", modules_to_save=whole))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    generator = Generator(adapted.eval(), base.processing, base.device)
    with_adapter, without = Dialogue(generator, 4), Dialogue(generator, 4, without_adapter=True)
    for turn in range(3):
        for dialogue in (with_adapter, without):
            dialogue.attach(pictures[turn : turn + 1])
        assert_exact(with_adapter, f"And {turn}?")
        assert_exact(without, f"And {turn}?", plain.model)
    assert [turn.text for turn in with_adapter.turns] != [turn.text for turn in without.turns]


def make_llava(text_config: dict[str, Any]) -> Generator:
    """A LLaVA with the demo's tower and tokenizer, and another language model with random weights."""
    demo = load_generator(str(DEMO_MODEL), "float32")
    widths = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {**widths, "vocab_size": demo.model.config.text_config.vocab_size, "max_position_embeddings": 2048, **text_config}
    config = LlavaConfig(
        vision_config=demo.model.config.vision_config.to_dict(),
        text_config=text,
        image_token_index=demo.model.config.image_token_id,
        vision_feature_layer=demo.model.config.vision_feature_layer,
        vision_feature_select_strategy=demo.model.config.vision_feature_select_strategy,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.get_output_embeddings().weight.data[config.image_token_id] = 0
    return Generator(model, demo.processing, demo.device)


QWEN_WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
MISTRAL_WINDOW = {"model_type": "mistral", "sliding_window": 12}


@pytest.mark.parametrize("text_config", [QWEN_WINDOW, MISTRAL_WINDOW], ids=["some layers", "all layers"])
def test_layers_that_attend_to_a_window_go_on_and_are_cut(text_config: dict[str, Any], pictures: list[str]) -> None:
    generator = make_llava(text_config)
    language_model: Any = generator.model.get_submodule("model.language_model")
    assert window_of(language_model.layers[-1].self_attn) == 12
    assert can_go_on(generator.model.config)
    dialogue = Dialogue(generator, 4)
    for turn in range(5):
        dialogue.attach(pictures[turn : turn + 1])
        counted, length = assert_exact(dialogue, f"And {turn}?")
    assert counted.tokens < length / 2
    dialogue.undo()
    assert_exact(dialogue, "Something else?")


STATES = {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_multiple_of": 16}
STRETCHED = {"model_type": "qwen2", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64}


@pytest.mark.parametrize("text_config", [STATES, STRETCHED], ids=["layers with a state", "angles that depend on the length"])
def test_a_model_that_cannot_go_on_reads_everything_again(text_config: dict[str, Any], pictures: list[str]) -> None:
    generator = make_llava(text_config)
    assert not can_go_on(generator.model.config)
    dialogue = Dialogue(generator, 1)  # the library's own cache is not exact there: one token each
    generator.model.config.text_config.max_position_embeddings = 2048  # room; the angles have been laid out
    for turn in range(4):
        dialogue.attach(pictures[turn : turn + 1])
        counted, length = assert_exact(dialogue, f"And {turn}?")
        assert counted.tokens == length
        assert counted.pixels == 1  # images are not encoded again all the same


@pytest.mark.parametrize("cut", ["undo", "drop_oldest", "go_on_from"])
def test_features_are_kept_of_what_is_talked_about_and_of_few_others(cut: str, generators: Callable[[str], Generator], tmp_path: Path) -> None:
    dialogue, kept, paths = Dialogue(generators("llava"), 1), [], []
    for number in range(40):
        paths.append(str(tmp_path / f"{number}.png"))
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (32, 32, 3), np.uint8)).save(paths[-1])
        dialogue.attach(paths[-1:])
        dialogue.ask("What?")
        kept.append(len(dialogue.context._features))
        if cut == "go_on_from":
            dialogue.go_on_from([])
        elif cut == "undo":
            dialogue.undo()
        elif len(dialogue.turns) > 2:
            dialogue.drop_oldest(1)
    assert kept[:10] == list(range(1, 11))
    assert max(kept) == kept[-1] == 16 + (2 if cut == "drop_oldest" else 1)
    for path, pixels in ((paths[-9], 0), (paths[0], 1)):  # one that left lately is still there
        dialogue.attach([path])
        with counting(dialogue) as counted:
            dialogue.ask("What?")
        assert counted.pixels == pixels
    with pytest.raises(InputError, match="gone"):
        dialogue.ask([*map(Image, paths[:30]), Image(str(tmp_path / "gone.png"))])
    dialogue.clear()
    dialogue.attach(paths)
    dialogue.ask("All?")
    assert len(dialogue.context._features) == 40  # all that are talked about stay
    with counting(dialogue) as counted:
        dialogue.ask("Once more?")
        dialogue.set_system("Be short.")
        dialogue.ask("And now?")
    assert counted.pixels == 0


def test_a_conversation_kept_elsewhere_goes_on_at_the_cost_of_what_is_new(generators: Callable[[str], Generator], pictures: list[str]) -> None:
    dialogue = Dialogue(generators("qwen2_5_vl"), 4)
    content = Path(pictures[0]).read_bytes()  # as an endpoint gets it: the bytes once more with every request
    question = Turn("user", (Image("picture", content), Text("What?")))
    answer = dialogue.ask(question.parts)
    for start in ((), (Turn("system", (Text("Be short."),)),)):
        turns = (*start, Turn("user", (Image("picture", bytes(bytearray(content))), Text("What?"))), Turn("assistant", (Text(answer),)))
        dialogue.go_on_from(turns)
        with counting(dialogue) as counted:
            dialogue.ask("And?")
        assert counted.pixels == 0
        assert (counted.tokens > 40) == bool(start)  # another beginning is read again
    assert (dialogue.system, len(dialogue.turns)) == ("Be short.", 4)
    before = list(dialogue.turns)
    with pytest.raises(InputError, match=r"gone\.png: no such image"):
        dialogue.go_on_from([Turn("user", (Image("gone.png"),)), Turn("assistant", (Text("a"),))])
    assert (dialogue.system, dialogue.turns) == ("Be short.", before)


# --- what goes wrong ---


def test_an_answer_that_is_broken_off_anywhere_leaves_a_dialogue_that_goes_on(generators: Callable[[str], Generator], pictures: list[str]) -> None:
    generator = generators("llava")
    dialogue = Dialogue(generator, 6)
    dialogue.attach(pictures[:1])
    assert_exact(dialogue, "First?")
    layers = dialogue.context.model.model.language_model.layers
    for number_of_pass in (1, 2):  # while the question is read, and while the answer is written
        turns, passes = list(dialogue.turns), 0

        def interrupt(*_: Any) -> None:
            nonlocal passes
            passes += 1
            if passes == number_of_pass:  # noqa: B023
                raise KeyboardInterrupt

        dialogue.attach(pictures[1:2])
        hook, said = layers[1].register_forward_hook(interrupt), []
        with pytest.raises(KeyboardInterrupt):
            for piece in dialogue.stream("Second?"):
                said.append(piece)
        hook.remove()
        assert dialogue.turns[:2] == turns[:2]
        assert len(dialogue.turns) == len(turns) + (2 if said else 0)
        assert not said or dialogue.turns[-1].text == "".join(said)
        assert len(dialogue.waiting) == (0 if said else 1)
        assert_exact(dialogue, "Third?")
        dialogue.waiting = []


def test_a_stream_that_is_closed_keeps_what_was_said_and_leaves_no_thread(generators: Callable[[str], Generator]) -> None:
    dialogue, threads = Dialogue(generators("qwen2_vl"), 64), threading.active_count()
    stream = dialogue.stream("Go on")
    said = next(stream) + next(stream)
    assert threading.active_count() == threads
    stream.close()
    assert [turn.text for turn in dialogue.turns] == ["Go on", said]
    assert_exact(dialogue, "More?")


def test_a_full_context_refuses_the_question_and_keeps_the_dialogue(generators: Callable[[str], Generator], pictures: list[str]) -> None:
    dialogue = Dialogue(generators("llava"), 8)
    dialogue.ask("One?")
    turns = list(dialogue.turns)
    most = dialogue.context.config.text_config.max_position_embeddings
    dialogue.attach(pictures * 60)
    with pytest.raises(InputError, match=rf"the context is full: .* has \d+ tokens .* 8 \(max_new_tokens\), the model takes {most}; .*/drop"):
        dialogue.ask("All of these?")
    assert (dialogue.turns, len(dialogue.waiting)) == (turns, 600)
    dialogue.waiting = []
    assert_exact(dialogue, "Two?")


def test_an_image_that_fails_is_named_and_nothing_changes(generators: Callable[[str], Generator], tmp_path: Path) -> None:
    dialogue = Dialogue(generators("llava"), 4)
    good, bad, gone = (tmp_path / f"{name}.png" for name in ("good", "bad", "gone"))
    for path in (good, bad, gone):
        PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), np.uint8)).save(path)
    bad.write_bytes(bad.read_bytes()[:300] + b"\0" * 300 + bad.read_bytes()[600:])  # damaged inside, with its end mark
    dialogue.ask("One?")
    turns, read = list(dialogue.turns), list(dialogue.context.tokens)
    with pytest.raises(InputError, match=r"(?s)no\.png: no such image.*rows\.png: no such image"):
        dialogue.attach([str(good), "no.png", "rows.png"])
    assert dialogue.waiting == []
    dialogue.attach([str(good), str(gone)])
    gone.unlink()
    with pytest.raises(InputError, match=r"gone\.png: no such image"):
        dialogue.ask("These?")
    with pytest.raises(InputError, match=r"bad\.png"):
        dialogue.ask((Image(str(good)), Image(str(bad)), Text("These?")))
    assert (dialogue.turns, dialogue.frames, dialogue.context.tokens) == (turns, [], read)
    dialogue.waiting = []
    assert_exact(dialogue, "Two?")


def test_an_image_that_changes_later_is_seen_as_it_was(generators: Callable[[str], Generator], tmp_path: Path) -> None:
    dialogue, path = Dialogue(generators("llava"), 4), tmp_path / "a.png"
    for number in range(2):
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (40, 40 + number, 3), np.uint8)).save(path)
        dialogue.attach([str(path)])
        with counting(dialogue) as counted:
            dialogue.ask("What?")
        assert counted.pixels == 1  # the second one is another image under the same name
    first, second = (features for features in dialogue.context._features.values())
    assert not torch.equal(first, second)
    dialogue.clear()
    dialogue.turns, dialogue.frames = [Turn("user", (Image(str(path)),)), Turn("assistant", (Text("a"),))], [dialogue.attachments.frames(Image(str(path)))]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"a\.png has changed since it was attached"):
        dialogue.ask("And now?")


# --- sampling ---


def test_a_seed_repeats_and_a_likely_few_are_drawn_from(generators: Callable[[str], Generator], pictures: list[str]) -> None:
    def answers(sampling: Sampling) -> list[str]:
        dialogue = Dialogue(generators("qwen3_vl"), sampling)
        dialogue.attach(pictures[:1])
        return [dialogue.ask("One?"), dialogue.ask("Two?")]

    drawn = answers(Sampling(12, temperature=1.0, seed=3))
    assert drawn == answers(Sampling(12, temperature=1.0, seed=3))
    assert drawn != answers(Sampling(12, temperature=1.0, seed=4))
    greedy = answers(Sampling(12))
    assert greedy == answers(Sampling(12, temperature=2.0, top_k=1)) == answers(Sampling(12, temperature=2.0, top_p=1e-6)) != drawn
    with pytest.raises(InputError, match=r"(?s)temperature: expected at least 0, got -1; top_p: .*top_k: .*seed"):
        Sampling(temperature=-1, top_p=0, top_k=-1, seed=-1)
