"""What the plugin uses of vLLM 0.32. Nothing is imported here: the check comes before an import that would fail."""

from __future__ import annotations

from jointkv.system.interfaces import Use

CORE, WORKER, CONNECTOR = "vllm.v1.core", "vllm.v1.worker", "vllm.distributed.kv_transfer.kv_connector.v1"
BACKENDS = "vllm.v1.attention.backends"

TABLES = (
    Use(f"{CORE}.kv_cache_manager:KVCacheManager", "block_pool coordinator enable_caching kv_cache_config"),
    Use(f"{CORE}.kv_cache_manager:KVCacheManager", "get_computed_blocks(_) prefix_cache_stats"),
    Use(f"{CORE}.kv_cache_manager:KVCacheBlocks", "get_block_ids()"),
    Use(f"{CORE}.kv_cache_coordinator:KVCacheCoordinator", "single_type_managers"),
    Use(f"{CORE}.single_type_kv_cache_manager:FullAttentionManager", "req_to_blocks num_cached_block block_size"),
    Use(
        f"{CORE}.block_pool:BlockPool",
        "blocks num_gpu_blocks hash_block_size free_block_queue cached_block_hash_to_block "
        "cached_block_hashes_by_block touch(_) free_blocks(_) get_new_blocks(_) get_num_free_blocks() "
        "evict_blocks(_) _insert_block_hash(_,_,num_tokens) get_usage() null_block",
    ),
    Use(f"{CORE}.block_pool:BlockPool", "enable_kv_cache_events kv_event_queue"),
    Use(f"{CORE}.kv_cache_utils", "maybe_convert_block_hash(_)"),
    Use("vllm.distributed.kv_events:BlockStored", "block_hashes parent_block_hash token_ids block_size extra_keys"),
    Use("vllm.distributed.kv_events:BlockRemoved", "block_hashes"),
    Use(f"{CORE}.block_pool:BlockHashToBlockMap", "get_one_block(_) pop(_,_)"),
    Use(
        f"{CORE}.kv_cache_utils:KVCacheBlock",
        "block_id ref_cnt is_null block_hash block_hash_num_tokens set_block_hash(_,num_tokens) reset_hash()",
    ),
    Use(f"{CORE}.kv_cache_utils:FreeKVCacheBlockQueue", "get_all_free_blocks()"),
    Use(f"{CORE}.kv_cache_utils", "BlockHash BlockHashWithGroupId make_block_hash_with_group_id(_,_)"),
    Use("vllm.v1.kv_cache_interface", "replace_as(_,_) MambaSpec MLAAttentionSpec RSWASpec"),
    Use("vllm.v1.kv_cache_interface:SlidingWindowSpec", "block_size"),
    Use("vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups num_blocks"),
    Use("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "kv_cache_spec layer_names"),
    Use("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry", "register(_,_) check_kv_cache_spec_registry(_)"),
)
REQUESTS = (
    Use(
        "vllm.v1.request:Request",
        "request_id status num_preemptions num_computed_tokens num_tokens num_prompt_tokens all_token_ids "
        "block_hashes cache_salt lora_request mm_features sampling_params prompt_embeds prompt_token_ids resumable "
        "max_tokens update_block_hashes()",
    ),
    Use(
        "vllm.v1.request:RequestStatus",
        "RUNNING WAITING PREEMPTED WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR FINISHED_ABORTED",
    ),
    Use("vllm.sampling_params:SamplingParams", "extra_args prompt_logprobs prompt_logprob_token_ids"),
    Use("vllm.exceptions", "VLLMValidationError"),
    Use("vllm.config:ModelConfig", "logits_processors"),
    Use("vllm.lora.request:LoRARequest", "lora_name lora_int_id"),
    Use("vllm.multimodal.inputs:MultiModalFeatureSpec", "identifier mm_position"),
    Use("vllm.multimodal.inputs:PlaceholderRange", "offset length"),
)
STEPS = (
    Use(
        f"{CORE}.sched.output:SchedulerOutput",
        "num_scheduled_tokens scheduled_new_reqs scheduled_cached_reqs new_block_ids_to_zero kv_connector_metadata",
    ),
    Use(f"{CORE}.sched.output:NewRequestData", "req_id block_ids num_computed_tokens"),
    Use(f"{CORE}.sched.output:CachedRequestData", "req_ids new_block_ids num_computed_tokens resumed_req_ids"),
    Use("vllm.v1.outputs:KVConnectorOutput", "kv_connector_worker_meta kv_connector_stats finished_recving"),
)
SCHEDULING = (
    Use(
        f"{CORE}.sched.scheduler:Scheduler",
        "connector requests running waiting deferred_waiting deferred_frees policy kv_cache_manager "
        "max_num_running_reqs max_num_scheduled_tokens "
        "add_request(_) finish_requests(_,_)",
    ),
    Use(f"{CORE}.sched.request_queue", "create_request_queue(_)"),
    Use(f"{CORE}.sched.request_queue:SchedulingPolicy", "FCFS"),
    Use(
        f"{CORE}.sched.request_queue:RequestQueue",
        "add_request(_) peek_request() pop_request() prepend_requests(_) __iter__ __len__",
    ),
    Use("vllm.v1.request", "Request(_,_,_,_,client_index,arrival_time,lora_request,cache_salt,priority)"),
    Use("vllm.v1.request:Request", "client_index arrival_time priority prefill_stats skip_reading_prefix_cache"),
    Use("vllm.sampling_params", "SamplingParams(max_tokens,temperature,ignore_eos,detokenize,extra_args)"),
    Use("vllm.v1.engine:EngineCoreOutputs", "outputs finished_requests"),
    Use("vllm.v1.engine:EngineCoreOutput", "request_id"),
    Use("vllm.v1.metrics.stats:SchedulerStats", "num_running_reqs num_waiting_reqs num_skipped_waiting_reqs"),
    Use("vllm.v1.metrics.stats:PrefixCacheStats", "requests queries hits"),
    Use(
        "vllm.v1.metrics.stats:PrefillStats",
        "num_prompt_tokens num_local_cached_tokens num_external_cached_tokens set(_,_,_)",
    ),
)
LAYERS = (
    Use(
        "vllm.model_executor.layers.attention.attention:Attention",
        "kv_cache kv_cache_dtype num_kv_heads head_size dtype impl",
    ),
    Use(
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention",
        "kv_cache kv_cache_dtype kv_lora_rank qk_rope_head_dim impl",
    ),
    Use("vllm.config.compilation:CompilationConfig", "static_forward_context"),
    Use("vllm.distributed.kv_transfer", "get_kv_transfer_group() has_kv_transfer_group()"),
)
CONFIGURATION = (
    Use(
        "vllm.config:VllmConfig",
        "model_config parallel_config scheduler_config cache_config device_config compilation_config "
        "speculative_config kv_transfer_config lora_config use_v2_model_runner max_concurrent_batches",
    ),
    Use(
        "vllm.config:ParallelConfig",
        "worker_cls pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size",
    ),
    Use("vllm.config:CacheConfig", "kv_sharing_fast_prefill enable_prefix_caching"),
    Use("vllm.config:SchedulerConfig", "disable_hybrid_kv_cache_manager scheduler_cls async_scheduling"),
    Use("vllm.config:DeviceConfig", "device_type"),
    Use("vllm.config:ModelConfig", "model revision get_total_num_kv_heads() get_head_size()"),
    Use(
        "vllm.config:KVTransferConfig",
        "kv_connector kv_connector_module_path kv_connector_extra_config kv_role kv_load_failure_policy",
    ),
    Use(f"{CONNECTOR.rpartition('.')[0]}.factory:KVConnectorFactory", "register_connector(_,_,_)"),
    Use(f"{CONNECTOR}.multi_connector:MultiConnector", "sub_connectors"),
    Use(f"{CONNECTOR}.multi_connector:MultiKVConnectorMetadata", "metadata"),
    Use("vllm.config:SpeculativeConfig", "method"),
)
METRICS = (
    Use(f"{CONNECTOR}.metrics:KVConnectorPromMetrics", "_counter_cls _gauge_cls _histogram_cls"),
    Use("vllm.v1.metrics.utils", "create_metric_per_engine(_,_)"),
)
ANY_ATTENTION = (
    Use("vllm.v1.attention.selector", "_cached_get_attn_backend"),
    Use(f"{BACKENDS}.registry", "register_backend(_,_)"),
    Use(f"{BACKENDS}.registry:AttentionBackendEnum", "get_path() is_overridden() clear_override()"),
    Use("vllm.v1.attention.backend:AttentionType", "DECODER"),
    Use(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "num_reqs seq_lens seq_lens_cpu_upper_bound max_seq_len max_query_len causal query_start_loc_cpu",
    ),
    Use(f"{CORE}.sched.output:SchedulerOutput", "finished_req_ids"),
    Use(f"{WORKER}.gpu_model_runner:GPUModelRunner", "compilation_config max_model_len parallel_config"),
    Use("vllm.config:ParallelConfig", "use_ubatching"),
)
CPU_ATTENTION = (
    *ANY_ATTENTION,
    Use(f"{BACKENDS}.registry:AttentionBackendEnum", "CPU_ATTN"),
    Use(
        f"{BACKENDS}.cpu_attn:CPUAttentionMetadata",
        "num_actual_tokens max_seq_len query_start_loc seq_lens block_table causal max_query_len slot_mapping "
        "scheduler_metadata",
    ),
    Use(
        f"{BACKENDS}.cpu_attn:CPUAttentionBackendImpl",
        "num_heads num_kv_heads head_size scale sliding_window alibi_slopes logits_soft_cap sinks attn_type "
        "do_kv_cache_update(_,_,_,_,_) is_fp8_kv_cache",
        "forward",
    ),
    Use("vllm._custom_ops", "cpu_attn_get_scheduler_metadata"),
    Use("vllm.envs", "VLLM_CPU_ATTN_SPLIT_KV"),
    Use(f"{BACKENDS}.cpu_attn:CPUAttentionMetadataBuilder", "vllm_config layer_names", "build"),
    Use(f"{BACKENDS}.cpu_attn:CPUAttentionBackend", "get_impl_cls() get_builder_cls()"),
)
QUANTIZED = "vllm.utils.torch_utils.is_quantized_kv_cache"
"""Whether pages are of 8 or 4 bits, by the name of their dtype."""

QUANTIZED_PAGES = Use(QUANTIZED.rpartition(".")[0], "is_quantized_kv_cache(_)")
GPU_ATTENTION = (
    *ANY_ATTENTION,
    Use(f"{BACKENDS}.registry:AttentionBackendEnum", "CUSTOM"),
    Use("vllm.v1.attention.backend:AttentionCGSupport", "NEVER"),
    Use("vllm.config:VllmConfig", "attention_config"),
    Use("vllm.config.attention:AttentionConfig", "backend_per_kind"),
    Use("vllm.v1.kv_cache_interface:KVCacheSpecKind", "FULL_ATTENTION"),
    Use("vllm.v1.kv_cache_interface:KVCacheLayout", "LBHNC BLHNC"),
    QUANTIZED_PAGES,
    Use("vllm.model_executor.layers.attention.attention:Attention", "use_mm_prefix"),
    Use(
        f"{BACKENDS}.triton_attn:TritonAttentionMetadata",
        "num_actual_tokens max_seq_len query_start_loc seq_lens block_table causal",
    ),
    Use(
        f"{BACKENDS}.triton_attn:TritonAttentionImpl",
        "num_heads num_kv_heads head_size scale sliding_window alibi_slopes logits_soft_cap sinks attn_type "
        "do_kv_cache_update(_,_,_,_,_) kv_cache_dtype chunk_lookback fused_output_quant_supported(_)",
        "forward",
    ),
    Use(
        f"{BACKENDS}.triton_attn:TritonAttentionMetadataBuilder",
        "vllm_config layer_names _cudagraph_support supports_update_block_table",
        "build",
    ),
    Use(
        f"{BACKENDS}.triton_attn:TritonAttentionBackend",
        "get_impl_cls() get_builder_cls() supported_kv_cache_layouts() supports_head_size(_)",
    ),
)
ATTENTION = {"cpu": CPU_ATTENTION, "gpu": GPU_ATTENTION}
"""By device; needed only where attention reads shared pages once, without which attention is vLLM's."""

ALWAYS = (*TABLES, *REQUESTS, *STEPS, *SCHEDULING, *LAYERS, *CONFIGURATION, *METRICS)

SCHEDULED = "schedule finish_requests reset_prefix_cache update_from_output make_stats"

OVERRIDDEN = {
    "connector": (
        Use(
            f"{CONNECTOR}.base:KVConnectorBase_V1",
            "_connector_metadata _vllm_config _kv_transfer_config _kv_cache_config",
            "requires_kv_delivery bind_kv_cache_manager on_new_request build_connector_meta update_connector_output "
            "request_finished get_num_new_matched_tokens update_state_after_alloc reset_cache get_kv_connector_stats "
            "build_kv_connector_stats build_prom_metrics build_connector_worker_meta start_load_kv "
            "wait_for_layer_load save_kv_layer wait_for_save get_finished get_block_ids_with_load_errors shutdown",
        ),
        Use(f"{CONNECTOR}.base:SupportsHMA", "", "request_finished_all_groups"),
    ),
    "scheduler": (Use(f"{CORE}.sched.scheduler:Scheduler", "", SCHEDULED),),
    "scheduler a step ahead": (Use(f"{CORE}.sched.async_scheduler:AsyncScheduler", "", SCHEDULED),),
    "worker": (
        Use(
            f"{WORKER}.gpu_worker:Worker",
            "model_runner vllm_config",
            "init_device get_kv_cache_spec initialize_from_config execute_model",
        ),
    ),
    "check of requests": (
        Use(
            "vllm.v1.sample.logits_processor:LogitsProcessor",
            "",
            "validate_params apply is_argmax_invariant update_state",
        ),
        Use(f"{WORKER}.gpu.sample.logits_processor:LogitsProcessor", "", "validate_params apply"),
    ),
    "verdict": (Use(f"{CONNECTOR}.base:KVConnectorWorkerMetadata", "", "aggregate"),),
    "statistics": (Use(f"{CONNECTOR}.metrics:KVConnectorStats", "data", "reset is_empty aggregate reduce"),),
    "metrics": (Use(f"{CONNECTOR}.metrics:KVConnectorPromMetrics", "", "observe"),),
    "layer group": (
        Use(
            "vllm.v1.kv_cache_interface:FullAttentionSpec",
            "block_size sliding_window attention_chunk_size",
            "merge is_uniform_with_collection",
        ),
    ),
    "layer group's tables": (
        Use(
            f"{CORE}.single_type_kv_cache_manager:FullAttentionManager",
            "",
            "get_num_blocks_to_allocate cache_blocks pop_blocks_for_free",
        ),
    ),
}
"""What vLLM calls of each part of the plugin: a method with another name there would never be called."""
