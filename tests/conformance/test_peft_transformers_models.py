"""PEFT's tests of decoders, encoder-decoders, feature extractors, classifiers and configurations, on FuRA."""

import peft_suite
import pytest

from fura_rl.adapter import FuraConfig

decoders = peft_suite.load("test_decoder_models")
decoders.PEFT_DECODER_MODELS_TO_TEST[:] = peft_suite.local("OPT", "GPT-2", "GPTJ", "Lama", "Qwen2", "Gemma-3")
decoders.ALL_CONFIGS[:] = [
    (FuraConfig, {"task_type": "CAUSAL_LM", "target_modules": None}),
    (FuraConfig, {"task_type": "CAUSAL_LM", "target_modules": None, "side": "output", "block_size": "head"}),
]
TestDecoderModels = decoders.TestDecoderModels

encoder_decoders = peft_suite.load("test_encoder_decoder_models")
encoder_decoders.PEFT_ENCODER_DECODER_MODELS_TO_TEST[:] = peft_suite.local("T5", "Bart")
encoder_decoders.ALL_CONFIGS[:] = [(FuraConfig, {"task_type": "SEQ_2_SEQ_LM", "target_modules": None})]
TestEncoderDecoderModels = encoder_decoders.TestEncoderDecoderModels

feature_extractors = peft_suite.load("test_feature_extraction_models")
feature_extractors.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = peft_suite.local(
    "Bert", "Roberta", "Deberta", "DebertaV2"
)
feature_extractors.ALL_CONFIGS[:] = [(FuraConfig, {"task_type": "FEATURE_EXTRACTION", "target_modules": None})]
TestPeftFeatureExtractionModel = feature_extractors.TestPeftFeatureExtractionModel

classifiers = peft_suite.load("test_seq_classifier")
classifiers.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = peft_suite.local("BertSeqCls", "RobertaSeqCls", "LamaSeqCls")
classifiers.ALL_CONFIGS[:] = [(FuraConfig, {"task_type": "SEQ_CLS", "target_modules": None})]
TestSequenceClassificationModels = classifiers.TestSequenceClassificationModels

token_classifiers = peft_suite.load("test_token_classification_qa")
token_classifiers.PEFT_TOKEN_CLS_MODELS_TO_TEST[:] = peft_suite.local("BertSeqCls", "RobertaSeqCls")
token_classifiers.TOKEN_CLS_CONFIGS[:] = [(FuraConfig, {"task_type": "TOKEN_CLS", "target_modules": None})]
token_classifiers.QA_CONFIGS[:] = [(FuraConfig, {"task_type": "QUESTION_ANS", "target_modules": None})]
TestTokenClassificationModels = token_classifiers.TestTokenClassificationModels
TestQuestionAnsweringModels = token_classifiers.TestQuestionAnsweringModels

configs = peft_suite.load("test_config")
peft_suite.reparametrise(configs.TestPeftConfig, configs.ALL_CONFIG_CLASSES, [(FuraConfig, {})])
configs.PEFT_MODELS_TO_TEST[:] = [(peft_suite.saved_lora_config(), None)]  # the tests expect a LoRA configuration
configs.LAYER_INDEXING_CONFIG_CLASSES[:] = [(FuraConfig, {})]
TestPeftConfig = configs.TestPeftConfig


class TestMixedBatches(decoders.TestDecoderModels):
    """PEFT lets only LoRA into its tests of several adapters in one batch: here FuRA takes LoRA's place in them."""

    @pytest.fixture(autouse=True)
    def admit_fura(self, monkeypatch):
        monkeypatch.setattr(peft_suite.load("testing_common"), "LoraConfig", FuraConfig)

    @pytest.mark.parametrize("model_id", peft_suite.local("OPT", "GPT-2", "Lama", "Qwen2"))
    @pytest.mark.parametrize("config_cls,config_kwargs", decoders.ALL_CONFIGS)
    def test_mixed_adapter_batches(self, model_id, config_cls, config_kwargs):
        self._test_mixed_adapter_batches(model_id, config_cls, {**config_kwargs, "init_weights": False})

    @pytest.mark.parametrize("model_id", peft_suite.local("OPT", "Lama"))
    @pytest.mark.parametrize("config_cls,config_kwargs", decoders.ALL_CONFIGS)
    def test_generate_with_mixed_adapter_batches(self, model_id, config_cls, config_kwargs):
        kwargs = {**config_kwargs, "init_weights": False}
        self._test_generate_with_mixed_adapter_batches_and_beam_search(model_id, config_cls, kwargs)


class TestMixedBatchesEncoderDecoder(encoder_decoders.TestEncoderDecoderModels):
    """As above; beam search repeats the decoder's rows, not the encoder's."""

    @pytest.fixture(autouse=True)
    def admit_fura(self, monkeypatch):
        monkeypatch.setattr(peft_suite.load("testing_common"), "LoraConfig", FuraConfig)

    @pytest.mark.parametrize("model_id", peft_suite.local("T5"))
    @pytest.mark.parametrize("config_cls,config_kwargs", encoder_decoders.ALL_CONFIGS)
    def test_generate_with_mixed_adapter_batches(self, model_id, config_cls, config_kwargs):
        kwargs = {**config_kwargs, "init_weights": False}
        self._test_generate_with_mixed_adapter_batches_and_beam_search(model_id, config_cls, kwargs)


for mixed in (TestMixedBatches, TestMixedBatchesEncoderDecoder):  # the inherited tests run above already
    for name in dir(mixed):
        if name.startswith("test_") and "mixed" not in name:
            setattr(mixed, name, None)
