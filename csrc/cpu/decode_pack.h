// Tensors of packed weights. Included after foreach_isa.h with a decoder's kernels size_of_packed and pack_weights; `W`
// tells its weights, and W::Operand what they are multiplied as.
#pragma once

template <class W>
int64_t packed_size(Isa isa, const W& weights) {
  int64_t bytes = 0;
  CALL_AT(isa, typename W::Operand, size_of_packed, weights, bytes);
  return HEADER + bytes;
}

template <class W>
Tensor pack(const PackedHeader& header, const Tensor& like, const W& weights) {
  const Isa isa = Isa(header.isa);
  const int64_t bytes = packed_size(isa, weights);
  Tensor packed = empty(like, {bytes}, ScalarType::Byte);
  char* data = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(data, &header, HEADER);
  parallel(team_size(double(bytes)),
           [&](Team& team) { CALL_AT(isa, typename W::Operand, pack_weights, team, weights, data + HEADER); });
  return packed;
}

// What `packed` holds after its header, which must be `header`; packs the weights where it is not given.
template <class W>
char* find_packed(std::optional<Tensor>& packed, const PackedHeader& header, const Tensor& like, const W& weights) {
  if (!packed) packed = pack(header, like, weights);
  CHECK(packed->scalar_type() == ScalarType::Byte && packed->is_cpu() && packed->is_contiguous() &&
            packed->numel() >= HEADER,
        "packed must be what the op's pack function returns");
  char* data = static_cast<char*>(packed->data_ptr());
  CHECK(std::memcmp(data, &header, HEADER) == 0 && packed->numel() == packed_size(Isa(header.isa), weights),
        "packed was made of other weights, with another int8 or at another CPU capability: pack again");
  return data + HEADER;
}
